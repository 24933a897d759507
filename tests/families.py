"""Tiny models of every kind that the package serves, each with examples that it learns from in less than a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

from lightning_tracin import TracInMixin

VOCABULARY, HIDDEN, CLASSES = 60, 16, 3
PADDING, FIRST, MASK = 0, 2, 4
N_TRAIN, N_TEST, BATCH_SIZE = 17, 5, 5
EMBEDDING_RATE, OTHER_RATE, DECAY, STEPS_PER_EPOCH = 0.02, 0.01, 0.8, 4


class Module(pl.LightningModule):
    """Has its two layers by name, a loss of a batch, and a rate that differs by layer and falls at every step."""

    embedding: str | None
    last: str

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def slow_parameters(self):
        """The last layer goes with the embedding where the two share a weight."""
        embedding = [] if self.embedding is None else list(self.get_submodule(self.embedding).parameters())
        last = list(self.get_submodule(self.last).parameters())
        return {id(each) for each in embedding + (last if last[0] in set(embedding) else [])}

    def configure_optimizers(self):
        trained = [each for each in self.parameters() if each.requires_grad]
        slow = self.slow_parameters()
        groups = [
            {"params": [each for each in trained if id(each) in slow], "lr": EMBEDDING_RATE},
            {"params": [each for each in trained if id(each) not in slow], "lr": OTHER_RATE},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def mean_rates(self, layer: str, epochs: int = 2) -> list[float]:
        """The layer's mean rate in each epoch; a layer that is not trained has that of the others."""
        weight = self.get_submodule(layer).weight
        rate = EMBEDDING_RATE if weight.requires_grad and id(weight) in self.slow_parameters() else OTHER_RATE
        steps = range(STEPS_PER_EPOCH)
        return [
            rate * sum(DECAY ** (epoch * STEPS_PER_EPOCH + step) for step in steps) / STEPS_PER_EPOCH
            for epoch in range(epochs)
        ]


class HuggingFace(TracInMixin, Module):
    """Everything by default; the loss is the model's own."""

    def __init__(self, model: nn.Module, *, embedding: str, last: str) -> None:
        super().__init__()
        self.model = model
        self.embedding = f"model.{embedding}"
        self.last = f"model.{last}"

    def forward(self, **batch):
        return self.model(**batch)

    def loss(self, batch):
        return self.model(**batch).loss


class WithoutMixin(Module):
    """A network in plain torch that knows nothing of influence."""

    def __init__(self, network: nn.Module, *, embedding: str | None = "network.embedding") -> None:
        super().__init__()
        self.network = network
        self.embedding = embedding
        self.last = "network.head"

    def loss(self, batch):
        inputs, labels = batch
        return functional.cross_entropy(self.network(inputs), labels)


class Plain(TracInMixin, WithoutMixin):
    def influence_loss(self, batch):
        inputs, labels = batch
        return functional.cross_entropy(self.network(inputs), labels, reduction="none")


class ScaledLoss(HuggingFace):
    scale = 1.0

    def influence_loss(self, batch):
        return super().influence_loss(batch) * self.scale


class RecurrentNet(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PADDING)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=batch_first)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids):
        _, (state, _) = self.lstm(self.embedding(ids))
        return self.head(state[-1])


class ConvolutionalNet(nn.Module):
    """Its head is registered before what it follows; batch norm mixes the examples of a training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PADDING)
        self.convolution = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, ids):
        features = self.norm(self.convolution(self.embedding(ids).transpose(1, 2)))
        return self.head(self.hidden(features.relu().amax(2)).relu())


class ImageNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 * 4 * 4, CLASSES, bias=False)

    def forward(self, images):
        return self.head(self.convolution(images).relu().flatten(1))


class EncoderPairNet(nn.Module):
    """Reads the two halves of its input with one embedding layer, called once for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PADDING)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, ids):
        halves = [self.hidden(self.embedding(half)).tanh().mean(1) for half in ids.chunk(2, dim=1)]
        return self.head(torch.cat(halves, dim=1))


class PositionsNet(nn.Module):
    """With positions and segments in embedding layers of their own, beside that of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, HIDDEN)
        self.segments = nn.Embedding(2, HIDDEN)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PADDING)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        vectors = self.positions(places) + self.segments((places > 3).long().expand_as(ids)) + self.embedding(ids)
        return self.head(self.hidden(vectors).tanh().mean(1))


class BagNet(nn.Module):
    """Bags of words: their mean, or their sum with weights."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, HIDDEN, mode=mode, padding_idx=PADDING)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids):
        weights = 1 / (1 + torch.arange(ids.shape[1])).expand_as(ids) if self.embedding.mode == "sum" else None
        return self.head(self.hidden(self.embedding(ids, per_sample_weights=weights)).tanh())


class OffsetsNet(BagNet):
    """Takes the words of all examples in one row, and where each example begins."""

    def forward(self, words):
        ids, offsets = words
        return self.head(self.hidden(self.embedding(ids, offsets)).tanh())


class SentencePairNet(EncoderPairNet):
    """Reads the two halves in one call of twice as many rows, first all first ones."""

    def forward(self, ids):
        first, second = self.hidden(self.embedding(torch.cat(ids.chunk(2, dim=1)))).tanh().mean(1).chunk(2)
        return self.head(torch.cat([first - second, first * second], dim=1))


class RewardNet(nn.Module):
    """One number for each text; its head is called on a chosen and on a rejected one for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PADDING)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, ids):
        return self.head(self.hidden(self.embedding(ids)).tanh().mean(1))[:, 0]


class Preferring(WithoutMixin):
    """Trained on pairs of a chosen and a rejected text; knows nothing of influence."""

    interleaved = False

    def losses(self, batch):
        both = (batch["chosen"], batch["rejected"])
        if self.interleaved:  # a chosen one, its rejected one, the next chosen one, ...
            rewards = self.network(torch.stack(both, 1).flatten(0, 1)).view(-1, 2)
            return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
        chosen, rejected = self.network(torch.cat(both)).chunk(2)
        return -functional.logsigmoid(chosen - rejected)

    def loss(self, batch):
        return self.losses(batch).mean()


class PreferringWithMixin(TracInMixin, Preferring):
    def influence_loss(self, batch):
        return self.losses(batch)


class Interleaved(PreferringWithMixin):
    interleaved = True


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def sentences(length: int = 8, padding: int = PADDING) -> tuple[Tensor, Tensor]:
    """Ids (N, T), padded on the right, and their mask; the same first token everywhere, words that come again."""
    generator, count = draw(), N_TRAIN + N_TEST
    ids = torch.randint(5, VOCABULARY // 2, (count, length), generator=generator)
    ids[:, 0] = FIRST
    lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return ids.where(mask, padding), mask


def rows(columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def classes(ids, mask):
    return torch.randint(CLASSES, (len(ids),), generator=draw())


def two_classes(ids, mask):
    return torch.randint(2, (len(ids),), generator=draw())


def class_sets(ids, mask):
    return (torch.rand(len(ids), CLASSES, generator=draw()) < 0.5).float()


def numbers(ids, mask):
    return torch.randn(len(ids), generator=draw())


def tags(ids, mask):
    return torch.randint(CLASSES, ids.shape, generator=draw()).where(mask, -100)


def next_words(ids, mask):
    return ids.where(mask, -100)


def labelled_texts(labels: Callable[[Tensor, Tensor], Tensor], padding: int = PADDING) -> list[dict[str, Tensor]]:
    ids, mask = sentences(padding=padding)
    return rows({"input_ids": ids, "attention_mask": mask.long(), "labels": labels(ids, mask)})


def padded_on_the_left(texts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The last padding of each text now predicts its first word."""
    return [
        {name: column.roll(len(column) - int(text["attention_mask"].sum())) for name, column in text.items()}
        for text in texts
    ]


def masked_texts(padding: int = PADDING) -> list[dict[str, Tensor]]:
    ids, mask = sentences(padding=padding)
    hidden = (torch.rand(ids.shape, generator=draw()) < 0.3) & mask
    hidden[:, 1] = True
    masked = ids.masked_fill(hidden, MASK)
    return rows({"input_ids": masked, "attention_mask": mask.long(), "labels": ids.where(hidden, -100)})


def translations(padding: int = PADDING) -> list[dict[str, Tensor]]:
    ids, mask = sentences(padding=padding)
    targets, target_mask = sentences(length=5)
    labels = targets.flip(0).where(target_mask.flip(0), -100)
    return rows({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})


def choices(n_choices: int = 3) -> list[dict[str, Tensor]]:
    """Questions with several answers to choose from, (C, T) each."""
    ids, mask = sentences(length=6)
    columns = [torch.stack([column.roll(5 * c, 0) for c in range(n_choices)], 1) for column in (ids, mask.long())]
    return rows({"input_ids": columns[0], "attention_mask": columns[1], "labels": classes(ids, mask)})


def questions() -> list[dict[str, Tensor]]:
    """Texts with an answer from one position to another."""
    ids, mask = sentences()
    lengths = mask.sum(1)
    start = (torch.rand(len(ids), generator=draw()) * lengths).long()
    end = start + (torch.rand(len(ids), generator=draw()) * (lengths - start)).long()
    return rows({"input_ids": ids, "attention_mask": mask.long(), "start_positions": start, "end_positions": end})


def preferences() -> list[dict[str, Tensor]]:
    ids, _ = sentences(length=6)
    return rows({"chosen": ids, "rejected": ids.roll(3, 0)})


def pairs(length: int) -> list[tuple[Tensor, Tensor]]:
    ids, mask = sentences(length)
    return list(zip(ids, classes(ids, mask), strict=True))


def images() -> list[tuple[Tensor, Tensor]]:
    pictures = torch.randn(N_TRAIN + N_TEST, 1, 6, 6, generator=draw())
    return list(zip(pictures, classes(pictures, None), strict=True))


def time_first(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*batch, strict=True)
    return torch.stack(ids, dim=1), torch.stack(labels)


def in_one_row(batch: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Without padding, as nn.EmbeddingBag takes texts."""
    texts = [ids[ids != PADDING] for ids, _ in batch]
    offsets = torch.tensor([0, *map(len, texts[:-1])]).cumsum(0)
    return (torch.cat(texts), offsets), torch.stack([label for _, label in batch])


def cut_to_the_longest(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches differ in their lengths, as with transformers' DataCollatorWithPadding."""
    columns = default_collate(batch)
    longest = int(columns["attention_mask"].sum(1).max())
    return {name: column[:, :longest] if column.dim() == 2 else column for name, column in columns.items()}


def bert(kind: str, last: str, module: type[HuggingFace] = HuggingFace, dropout: float = 0.0, **options):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **{"initializer_range": 0.3, **options},
    )
    return module(getattr(transformers, kind)(config), embedding="bert.embeddings.word_embeddings", last=last)


def bert_classifier(**options):
    return bert("BertForSequenceClassification", "classifier", **options)


def distilbert_masked():
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=16,
        dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.3,
    )
    model = transformers.DistilBertForMaskedLM(config)
    return HuggingFace(model, embedding="distilbert.embeddings.word_embeddings", last="vocab_projector")


def roberta_masked():
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        pad_token_id=1,
    )
    model = transformers.RobertaForMaskedLM(config)
    return HuggingFace(model, embedding="roberta.embeddings.word_embeddings", last="lm_head.decoder")


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=FIRST,
        eos_token_id=FIRST,
    )
    return HuggingFace(transformers.GPT2LMHeadModel(config), embedding="transformer.wte", last="lm_head")


def gemma():
    """Its embedding layer multiplies the rows by the root of their size."""
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
        bos_token_id=FIRST,
        eos_token_id=FIRST,
    )
    return HuggingFace(transformers.GemmaForCausalLM(config), embedding="model.embed_tokens", last="lm_head")


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=PADDING,
    )
    return HuggingFace(transformers.T5ForConditionalGeneration(config), embedding="shared", last="lm_head")


def bart():
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=16,
        dropout=0.0,
        init_std=0.3,
    )
    return HuggingFace(transformers.BartForConditionalGeneration(config), embedding="model.shared", last="lm_head")


def lora(*targets: str):
    module = bert_classifier(num_labels=CLASSES)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value", *targets])
    module.model = get_peft_model(module.model, config)
    inside = "model.base_model.model"
    words = f"{inside}.bert.embeddings.word_embeddings"
    module.embedding = f"{words}.base_layer" if "word_embeddings" in targets else words
    module.last = f"{inside}.classifier.modules_to_save.default"
    return module


def frozen_embedding():
    module = Plain(RecurrentNet(batch_first=True))
    module.network.embedding.requires_grad_(False)
    return module


@dataclass(frozen=True)
class Family:
    """A module to build afresh, always with the same first weights, and its examples: the last few are for testing."""

    module: Callable[[], Module]
    examples: list[Any]
    collate: Callable[[list[Any]], Any] | None = None
    masked_tokens: tuple[int, ...] = ()  # ids that occur only where the attention mask is 0, and yet reach the loss

    def build(self) -> Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.module()

    def train_loader(self) -> DataLoader:
        return self._loader(self.examples[:N_TRAIN], BATCH_SIZE, shuffle=True)

    def test_loader(self) -> DataLoader:
        return self._loader(self.examples[N_TRAIN:], 2)

    def singles(self, loader: DataLoader) -> DataLoader:
        """The loader's examples in the order of the data set, each a batch of its own."""
        return self._loader(loader.dataset, 1)

    def _loader(self, examples: Any, batch_size: int, *, shuffle: bool = False) -> DataLoader:
        return DataLoader(examples, batch_size=batch_size, shuffle=shuffle, collate_fn=self.collate)


FAMILIES = {
    "bert-binary": Family(lambda: bert_classifier(num_labels=2), labelled_texts(two_classes)),
    "bert-classes": Family(lambda: bert_classifier(num_labels=CLASSES), labelled_texts(classes)),
    "bert-dropout": Family(lambda: bert_classifier(num_labels=CLASSES, dropout=0.1), labelled_texts(classes)),
    "bert-padded-by-batch": Family(
        lambda: bert_classifier(num_labels=CLASSES), labelled_texts(classes), cut_to_the_longest
    ),
    "bert-multi-label": Family(
        lambda: bert_classifier(num_labels=CLASSES, problem_type="multi_label_classification"),
        labelled_texts(class_sets),
    ),
    "bert-regression": Family(lambda: bert_classifier(num_labels=1), labelled_texts(numbers)),
    "bert-tokens": Family(
        lambda: bert("BertForTokenClassification", "classifier", num_labels=CLASSES), labelled_texts(tags)
    ),
    "gpt2-causal": Family(gpt2, labelled_texts(next_words)),
    "gpt2-padded-on-the-left": Family(gpt2, padded_on_the_left(labelled_texts(next_words)), masked_tokens=(PADDING,)),
    "gemma-causal": Family(gemma, labelled_texts(next_words)),
    "bert-masked": Family(lambda: bert("BertForMaskedLM", "cls.predictions.decoder"), masked_texts()),
    "distilbert-masked": Family(distilbert_masked, masked_texts()),
    "roberta-masked": Family(roberta_masked, masked_texts(padding=1)),
    "t5": Family(t5, translations()),
    "bart": Family(bart, translations(padding=1)),
    "lora": Family(lora, labelled_texts(classes)),
    "lora-on-embedding": Family(lambda: lora("word_embeddings"), labelled_texts(classes)),
    "lstm": Family(lambda: Plain(RecurrentNet(batch_first=True)), pairs(BATCH_SIZE)),
    "lstm-time-first": Family(lambda: Plain(RecurrentNet(batch_first=False)), pairs(BATCH_SIZE), time_first),
    "cnn": Family(lambda: Plain(ConvolutionalNet()), pairs(8)),
    "embedding-called-twice": Family(lambda: Plain(EncoderPairNet()), pairs(8)),
    "frozen-embedding": Family(frozen_embedding, pairs(8)),
    "without-mixin": Family(lambda: WithoutMixin(ConvolutionalNet()), pairs(8)),
    "bert-choices": Family(lambda: bert("BertForMultipleChoice", "classifier"), choices()),
    "bert-answers": Family(lambda: bert("BertForQuestionAnswering", "qa_outputs"), questions()),
    "beside-positions": Family(lambda: Plain(PositionsNet()), pairs(8)),
    "beside-positions-without-mixin": Family(lambda: WithoutMixin(PositionsNet()), pairs(8)),
    "bag-mean": Family(lambda: Plain(BagNet("mean")), pairs(8)),
    "bag-weighted": Family(lambda: Plain(BagNet("sum")), pairs(8)),
    "bag-in-one-row": Family(lambda: Plain(OffsetsNet("mean")), pairs(8), in_one_row),
    "sentence-pairs": Family(lambda: Plain(SentencePairNet()), pairs(8)),
    "sentence-pairs-without-mixin": Family(lambda: WithoutMixin(SentencePairNet()), pairs(8)),
    "preferences": Family(lambda: PreferringWithMixin(RewardNet()), preferences()),
    "preferences-interleaved": Family(lambda: Interleaved(RewardNet()), preferences()),
    "preferences-without-mixin": Family(lambda: Preferring(RewardNet()), preferences()),
    "images": Family(lambda: Plain(ImageNet(), embedding=None), images()),
}
