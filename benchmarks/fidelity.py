"""Do gradients taken in training tell as much as those of a pass? The linear datamodelling score of either.

A convolutional network over word embeddings (BBC News, 48 tokens) is fitted once with both caches, and then again and
again on random halves of the training set. A test article's score on a half is the sum of that half's influences; the
linear datamodelling score (Park et al. 2023) is the rank correlation of these sums with what the networks fitted to the
halves say of the article, averaged over test articles.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import AutoTokenizer

from benchmarks.measure import Row, parser, report
from benchmarks.workload import quiet
from examples.classifier import Tokenized
from examples.data import bbc_news, packaged_minilm
from lightning_tracin import TracInCallback, TracInLast, TracInMixin, TracInWE
from lightning_tracin.metrics.functional import linear_datamodeling_score

_TOKENS, _VOCABULARY, _HIDDEN = 48, 30522, 128


class Network(TracInMixin, pl.LightningModule):
    """Word embeddings, convolutions of width 3 and 5, a hidden layer with dropout, five topics."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _HIDDEN, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(_HIDDEN, 100, width, padding=width // 2) for width in (3, 5))
        self.hidden = nn.Linear(200, 100)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(100, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (B, 5)."""
        words = self.embedding(ids).transpose(1, 2)
        features = torch.cat([convolution(words).relu().amax(2) for convolution in self.convolutions], dim=1)
        logits: Tensor = self.head(self.dropout(self.hidden(features).relu()))
        return logits

    def influence_loss(self, batch: list[Tensor]) -> Tensor:
        """The loss of each example."""
        return functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Their mean."""
        return self.influence_loss(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def articles(n_train: int, n_test: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test articles as padded ids."""
    texts, _ = bbc_news()
    random.Random(0).shuffle(texts)
    rows = Tokenized(texts[: n_train + n_test], AutoTokenizer.from_pretrained(packaged_minilm()), _TOKENS).rows
    ids = torch.zeros(len(rows), _TOKENS, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    labels = torch.tensor([row["labels"] for row in rows])
    return TensorDataset(ids[:n_train], labels[:n_train]), TensorDataset(ids[n_train:], labels[n_train:])


def fit(data: Any, epochs: int, callbacks: list[Any], seed: int) -> Any:
    """A trainer that has fitted a new network."""
    pl.seed_everything(seed, verbose=False)
    trainer = quiet(max_epochs=epochs, callbacks=callbacks)
    trainer.fit(Network(), DataLoader(data, batch_size=64, shuffle=True))
    return trainer


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=1600)
    arguments.add_argument("--tests", type=int, default=120)
    arguments.add_argument("--models", type=int, default=100, help="networks that are trained on random halves")
    arguments.add_argument("--epochs", type=int, default=4)
    options = arguments.parse_args()
    train, test = articles(options.examples, options.tests)
    caches = {"a pass at each checkpoint": "checkpoint", "training's own backward passes": "training"}
    methods = {"TracInWE": TracInWE(), "TracInWE, cosine": TracInWE(normalize="cosine"), "TracInLast": TracInLast()}
    scores: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [TracInCallback(Path(folder) / cache, cache=cache) for cache in caches.values()]  # type: ignore[arg-type]
        trainer = fit(train, options.epochs, callbacks, seed=0)
        for name, cache in caches.items():
            for kind, method in methods.items():
                loader = DataLoader(test, batch_size=64)
                scores[f"{kind}, {name}"] = trainer.influence(loader, trace=Path(folder) / cache, method=method).scores
    ids, labels = test.tensors
    halves, outputs = [], []
    for model in range(options.models):
        half = torch.zeros(options.examples, dtype=torch.bool)
        chosen = torch.randperm(options.examples, generator=torch.Generator().manual_seed(model))
        half[chosen[: options.examples // 2]] = True
        module = fit(
            Subset(train, half.nonzero()[:, 0].tolist()), options.epochs, [], model + 1
        ).lightning_module.eval()
        with torch.no_grad():
            outputs.append(-functional.cross_entropy(module(ids), labels, reduction="none"))
        halves.append(half)
    said = torch.stack(outputs)  # (models, tests)
    rows = []
    for name, values in scores.items():
        found = linear_datamodeling_score(values, torch.stack(halves), said)
        details = {"standard error": float(found.se_tests), "each": found.per_test.tolist()}
        rows.append(Row(name, float(found.mean), "", details=details))
    title = f"Linear datamodelling score: {options.models} networks on halves of {options.examples} articles"
    report("fidelity", title, rows, options.out)


if __name__ == "__main__":
    main()
