"""A module of the other Lightning."""

from __future__ import annotations

import lightning.pytorch as twin
import torch
from torch import nn
from torch.nn import functional

from lightning_tracin import TracInMixin


class TwinToy(TracInMixin, twin.LightningModule):
    """A module of lightning.pytorch."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)

    def influence_loss(self, batch):
        return functional.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1], reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
