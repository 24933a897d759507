"""What is measured: MiniLM-L6 on BBC News, and synthetic texts whose words are as frequent as there."""

from __future__ import annotations

import random
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from examples.classifier import Classifier, Tokenized
from examples.data import bbc_news, packaged_minilm, sms_spam
from lightning_tracin import TracInMixin, Trainer
from lightning_tracin.gradients.word_gradients import WordGradients

TOKENS, HIDDEN, BATCH = 64, 384, 32


class Texts:
    """Texts for MiniLM: a training and a test set.

    BBC News is padded to 64 tokens as in the published protocols; short messages are padded to the longest of a batch.
    """

    def __init__(self, n_train: int, n_test: int, *, short: bool = False) -> None:
        texts, self.topics = sms_spam() if short else bbc_news()
        random.Random(0).shuffle(texts)
        self.tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
        self._padding = "longest" if short else "max_length"
        rows = Tokenized(texts[: n_train + n_test], self.tokenizer, 2 * TOKENS if short else TOKENS).rows
        if len(rows) < n_train + n_test:
            raise SystemExit(f"There are {len(rows)} texts, fewer than {n_train} and {n_test} for testing.")
        self._rows = {"train": rows[:n_train], "test": rows[n_train:]}

    def loader(self, part: str, batch_size: int = BATCH, *, shuffle: bool = False) -> DataLoader[Any]:
        """Batches of a part."""
        pad = partial(self.tokenizer.pad, padding=self._padding, max_length=TOKENS, return_tensors="pt")
        return DataLoader(self._rows[part], batch_size=batch_size, shuffle=shuffle, collate_fn=pad)  # type: ignore[arg-type]

    def module(self) -> Classifier:
        """A new classifier, each time the same."""
        pl.seed_everything(0, verbose=False)
        return Classifier(packaged_minilm(), self.topics, self.tokenizer, total_steps=1000)


def quiet(**options: Any) -> Trainer:
    """A trainer that prints nothing and writes no checkpoints of its own."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    settings: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "auto",
        "devices": 1,
    }
    return Trainer(**{**settings, **options})


@cache
def word_frequencies() -> Tensor:
    """How often each token of MiniLM's vocabulary occurs in BBC News, (30522,) float64, as shares."""
    articles, _ = bbc_news()
    tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
    rows = Tokenized(articles, tokenizer, TOKENS).rows
    ids = torch.tensor([token for row in rows for token in row["input_ids"][1:-1]])
    return torch.bincount(ids, minlength=len(tokenizer)).double() / len(ids)


class Synthetic(Dataset[tuple[Tensor, int]]):
    """Texts of words drawn by their real frequencies, between [CLS] and [SEP]; made when they are asked for."""

    def __init__(self, n_examples: int, seed: int = 0) -> None:
        self.n_examples = n_examples
        self.seed = seed
        self._cumulative = word_frequencies().cumsum(0)

    def __len__(self) -> int:
        return self.n_examples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        drawn = torch.rand(TOKENS - 2, generator=generator, dtype=torch.float64)
        words = torch.searchsorted(self._cumulative, drawn).clamp(max=len(self._cumulative) - 1)
        return torch.cat([torch.tensor([101]), words, torch.tensor([102])]), int(words.sum()) % 4


class Bag(TracInMixin, pl.LightningModule):
    """A mean of word embeddings and a linear layer: small, so that what is measured is everything else."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(word_frequencies()), hidden)
        self.head = nn.Linear(hidden, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (B, 4)."""
        logits: Tensor = self.head(self.embedding(ids).mean(1).tanh())
        return logits

    def influence_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of each example."""
        return functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Their mean."""
        return self.influence_loss(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def word_gradients(n_examples: int, seed: int, hidden: int = HIDDEN) -> WordGradients:
    """Random gradients of synthetic texts, in float32."""
    texts = Synthetic(n_examples, seed)
    tokens = torch.stack([texts[index][0] for index in range(n_examples)])
    keys = torch.unique(tokens + torch.arange(n_examples)[:, None] * len(word_frequencies()))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(keys), hidden, generator=generator)
    owners = torch.div(keys, len(word_frequencies()), rounding_mode="floor")
    return WordGradients.from_positions(n_examples, owners, keys % len(word_frequencies()), rows)


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
