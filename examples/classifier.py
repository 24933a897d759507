"""A pretrained transformer that classifies texts, and batches of texts for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from lightning_utilities.core import rank_zero
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoModelForSequenceClassification

from lightning_tracin import TracInMixin


class Classifier(TracInMixin, pl.LightningModule):
    """A Hugging Face classifier. ``TracInMixin`` finds its loss, its layers and its words by itself.

    Args:
        name: of the pretrained model on the Hugging Face hub, or its folder.
        label_names: in the order of the labels.
        tokenizer: of the model.
        total_steps: over which the learning rate decays.
        learning_rate: at the first step.
        n_layers: only the first so many layers of the transformer, which is faster; None: all.
    """

    def __init__(
        self,
        name: str,
        label_names: Sequence[str],
        tokenizer: Any,
        total_steps: int,
        learning_rate: float = 1e-4,
        n_layers: int | None = None,
    ) -> None:
        super().__init__()
        names = dict(enumerate(label_names))
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=len(names),
            id2label=names,
            label2id={each: number for number, each in names.items()},
            **({} if n_layers is None else {"num_hidden_layers": n_layers}),
        ).train()  # from_pretrained returns it in eval mode, without dropout
        self.tokenizer = tokenizer
        self.total_steps = total_steps
        self.learning_rate = learning_rate

    def forward(self, **batch: Tensor) -> Any:
        """The model's output, with its loss where the batch has labels."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        loss: Tensor = self(**batch).loss
        return loss

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The probability of each label."""
        probabilities: Tensor = self(**batch).logits.softmax(-1)
        return probabilities

    def configure_optimizers(self) -> Any:
        """AdamW with a linear decay to a tenth."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Tokenized(Dataset[dict[str, Any]]):
    """Labelled texts as token ids."""

    def __init__(self, texts: Sequence[tuple[str, int]], tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer([text for text, _ in texts], truncation=True, max_length=max_length)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, (_, label) in zip(encoded["input_ids"], encoded["attention_mask"], texts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def batches(
    data: Dataset[dict[str, Any]], tokenizer: Any, *, shuffle: bool = False, sampler: Sampler[int] | None = None
) -> DataLoader[Any]:
    """Batches of 32, padded to their longest text."""
    collate = partial(tokenizer.pad, return_tensors="pt")
    return DataLoader(data, batch_size=32, shuffle=shuffle, sampler=sampler, collate_fn=collate)


def predicted(trainer: pl.Trainer, data: Dataset[dict[str, Any]], tokenizer: Any) -> Tensor:
    """The probability of each label, (n, n_labels), by the model that a trainer has fitted."""
    found: Any = trainer.predict(trainer.lightning_module, batches(data, tokenizer))
    return torch.cat(found)


def be_quiet() -> None:
    """For many short fits: Lightning and transformers say nothing about each."""
    rank_zero.log.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
