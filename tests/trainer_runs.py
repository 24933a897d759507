"""Runs of Hugging Face's own Trainer on a tiny BERT, and what it did in them."""

from __future__ import annotations

import torch
import transformers
from brute_force import second_moments_of
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

VOCABULARY, N_TRAIN, N_TEST, STEPS_PER_EPOCH = 40, 12, 4, 3


def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, 7), generator=generator)
    lengths = torch.randint(3, 8, (n, 1), generator=generator)
    mask = torch.arange(7) < lengths
    return [
        {"input_ids": own * kept, "attention_mask": kept.long(), "labels": torch.tensor(number % 3)}
        for number, (own, kept) in enumerate(zip(ids, mask, strict=True))
    ]


def batches(n, seed, batch_size=4, collate_fn=None):
    return DataLoader(rows(n, seed), batch_size=batch_size, collate_fn=collate_fn)


class Watching(TrainerCallback):
    """What the Trainer did: the rate of each step, and Adam's second moments at each checkpoint."""

    def __init__(self):
        self.rates, self.moments = [], []

    def on_step_begin(self, args, state, control, *, optimizer, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_save(self, args, state, control, *, optimizer, model, **_):
        own = getattr(optimizer, "optimizer", optimizer)
        self.moments.append(
            {name: (values.clone(), eps) for name, (values, eps) in second_moments_of(own, model).items()}
        )


def trained(folder, **options):
    """What a run of the Trainer did, whose checkpoints are in a folder."""
    watching = Watching()
    arguments = TrainingArguments(
        str(folder),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "epoch",
            "logging_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "weight_decay": 0.01,
            **options,
        },
    )
    trainer = transformers.Trainer(model(), arguments, train_dataset=rows(N_TRAIN, 0), callbacks=[watching])
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return watching
