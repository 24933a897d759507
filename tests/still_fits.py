"""Fits that move the weights by nothing, so that gradients of training are those at the checkpoint."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn
from toy import Toy, loader, test_texts

METHODS = ("tracin-we", "tracin-last")


class Still(Toy):
    """Learns nothing, drops nothing."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-12)


def build(kind=Still):
    pl.seed_everything(5, verbose=False)
    return kind()


def scores_of(fit, method):
    """Scores of the toy's test examples, in units of the rate."""
    return fit.influence(loader(test_texts()), method=method).scores * 1e12


def assert_expected(fit, expected, epochs=1, *, rtol=1e-5):
    for method in METHODS:
        torch.testing.assert_close(scores_of(fit, method), epochs * expected[method], rtol=rtol, atol=1e-7)
