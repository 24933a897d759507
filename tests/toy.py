"""A tiny text classifier, random texts, and trainers that keep quiet."""

from __future__ import annotations

import os
import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_tracin import TracInCallback, TracInMixin, Trainer

VOCABULARY, CLASSES, N_TRAIN, N_TEST = 40, 3, 20, 6
EPOCHS, STEPS_PER_EPOCH, RATE, DECAY = 2, 5, 1e-2, 0.9


def texts(n: int = N_TRAIN, *, seed: int = 0, length: int = 7) -> TensorDataset:
    """Random token ids, padded at the end, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, length), generator=generator)
    ids[torch.arange(length) >= torch.randint(2, length + 1, (n, 1), generator=generator)] = 0
    return TensorDataset(ids, torch.randint(CLASSES, (n,), generator=generator))


def test_texts() -> TensorDataset:
    return texts(N_TEST, seed=1)


test_texts.__test__ = False


def loader(data=None, batch_size: int = 4, **options) -> DataLoader:
    return DataLoader(texts() if data is None else data, batch_size=batch_size, **options)


class Toy(TracInMixin, pl.LightningModule):
    """Mean of embeddings, a hidden layer, dropout; the rate falls at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.hidden = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids):
        words = (ids != 0).sum(1, keepdim=True)
        return self.head(self.dropout(torch.tanh(self.hidden(self.embedding(ids).sum(1) / words))))

    def influence_loss(self, batch):
        ids, labels = batch
        return functional.cross_entropy(self(ids), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(pl.LightningDataModule):
    """The texts, as a command line makes them."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return loader(batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self):
        return loader(test_texts())


def quiet(kind: type = Trainer, **options):
    """A trainer that writes nothing and prints nothing."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return kind(**{**settings, **options})


def fitted(path, module: pl.LightningModule | None = None, data=None, *, trainer: dict | None = None, **options):
    """A trainer that has fitted a module, reproducibly, with a callback that writes to ``path``."""
    pl.seed_everything(0, verbose=False)
    module = Toy() if module is None else module
    fit = quiet(
        callbacks=[TracInCallback(path, **{"dtype": "float32", "on_error": "raise", **options})], **(trainer or {})
    )
    if isinstance(data, pl.LightningDataModule):
        fit.fit(module, datamodule=data)
    else:
        fit.fit(module, loader(shuffle=True) if data is None else data)
    return fit


def site_of(owner, name: str):
    """The site of a trace or a checkpoint that the callback's ``methods`` asked for by a name."""
    (found,) = (site for site in owner.sites if site.name == name)
    return found


def environment(**changes: str) -> dict[str, str]:
    """For a process that finds what this one does: the package under test, and the modules here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


def leave() -> None:
    """End one of several processes when all have come here; what it has written must lie in closed files.

    Its process group is not destroyed: before torch 2.8 that may wait for ever, as the group waits for a thread of
    gloo that waits for Python's lock (pytorch#154976). Nor does Python clean up, during which such threads may abort.
    """
    torch.distributed.barrier()
    os._exit(0)


def mean_rate(first, last, rate=RATE):
    """Mean of the schedule over optimizer steps first..last - 1."""
    return sum(rate * DECAY**step for step in range(first, last)) / (last - first)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
