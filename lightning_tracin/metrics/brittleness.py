"""Brittleness: how few examples need to be removed until the model says something else?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.bootstrap import checked_bootstrap
from lightning_tracin.metrics.functional.brittleness import (
    BrittlenessResult,
    _brittleness_compute,
    _brittleness_update,
)
from lightning_tracin.metrics.functional.checks import growing_ks
from lightning_tracin.metrics.plots import plot_over_ks


class Brittleness(AttributionMetric):
    """The smallest number of proponents whose removal flips a prediction.

    See `functional.brittleness` for what it means. ``update`` takes ``predictions`` (n, n_k) or (n, n_seeds, n_k) int,
    and ``reference`` (n,) int, the whole model's predictions or the labels, of a batch of test examples; ``compute``
    returns a named tuple ``(smallest, share, interval)``.

    Args:
        ks: numbers of removed examples, growing; 0 stands for the whole model.
        level: of the interval.
        resamples: of the bootstrap over test examples.
        seed: of the bootstrap.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = Brittleness(ks=(0, 20, 40))
        >>> metric.update(torch.tensor([[0, 0, 1], [2, 1, 1]]), torch.tensor([0, 2]))
        >>> metric.update(torch.tensor([[1, 1, 1], [0, 0, 0]]), torch.tensor([2, 0]))
        >>> metric.compute().share
        tensor([0.2500, 0.5000, 0.7500])
    """

    smallest: list[Tensor]

    def __init__(
        self, ks: Sequence[int], *, level: float = 0.95, resamples: int = 2000, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.ks = growing_ks(ks, least=0)
        self.bootstrap = checked_bootstrap(level, resamples, seed)
        self._tell_apart(self.ks)
        self._add_rows("smallest", torch.float32)

    def update(self, predictions: Tensor, reference: Tensor) -> None:
        """Takes a batch of test examples."""
        self.smallest.append(_brittleness_update(predictions, reference, self.ks))

    def compute(self) -> BrittlenessResult:
        """The brittleness of all test examples so far."""
        return _brittleness_compute(dim_zero_cat(self.smallest), self.ks, *self.bootstrap)

    def _draw(self, val: BrittlenessResult, ax: _AX_TYPE | None) -> _PLOT_OUT_TYPE:
        """Draws the share of test examples that have flipped, and its interval."""
        return plot_over_ks(self.ks, val.share, val.interval, "Share flipped", ax)
