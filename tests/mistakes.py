"""Losses, modules and data that influence cannot be computed for."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import IterableDataset, TensorDataset
from toy import Toy, texts


def with_loss(loss):
    """A Toy whose influence_loss is another, and whose training is as before."""

    class Other(Toy):
        def influence_loss(self, batch):
            return loss(self, batch)

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self(batch[0]), batch[1])

    return Other()


def cross_entropy(module, batch, **options):
    return functional.cross_entropy(module(batch[0]), batch[1], **options)


class Plain(pl.LightningModule):
    """No mixin; its training_step returns what it is told to."""

    def __init__(self, loss):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.head(self.embedding(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def poisoned(index, value=torch.nan):
    """Losses that are not finite for the example whose label is 9."""

    def loss(module, batch):
        ids, labels = batch
        losses = functional.cross_entropy(module(ids), labels.clamp(max=2), reduction="none")
        return losses * torch.where(labels == 9, value, 1.0)

    data = texts()
    data.tensors[1][index] = 9

    module = with_loss(loss)
    module.training_step = lambda batch, batch_idx: functional.cross_entropy(module(batch[0]), batch[1].clamp(max=2))
    return module, data


class Endless(IterableDataset):
    def __iter__(self):
        return iter(texts())


def empty():
    return TensorDataset(torch.zeros(0, 7, dtype=torch.long), torch.zeros(0, dtype=torch.long))
