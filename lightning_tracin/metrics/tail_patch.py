"""Tail-patch: does one more step on a proponent make the target likelier?"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.bootstrap import checked_bootstrap
from lightning_tracin.metrics.functional.tail_patch import (
    TailPatchResult,
    _tail_patch_compute,
    _tail_patch_update,
)


class TailPatch(AttributionMetric):
    """The mean gain of the target's probability by one optimizer step on each of k proponents.

    See `functional.tail_patch` for what it means. ``update`` takes ``gains`` (n, k) of a batch of test examples, of the
    strongest proponent first; ``compute`` returns a named tuple ``(mean, interval, per_test, per_rank)``.

    Args:
        level: of the interval.
        resamples: of the bootstrap over test examples.
        seed: of the bootstrap.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = TailPatch()
        >>> metric.update(torch.tensor([[0.04, 0.02], [0.01, -0.01]]))
        >>> metric.update(torch.tensor([[0.03, 0.03]]))
        >>> metric.compute().mean
        tensor(0.0200)
    """

    plot_lower_bound = None
    plot_upper_bound = None
    drawn = "mean"

    gains: list[Tensor]

    def __init__(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bootstrap = checked_bootstrap(level, resamples, seed)
        self._add_rows("gains", dims=2)

    def update(self, gains: Tensor) -> None:
        """Takes a batch of test examples."""
        self.gains.append(_tail_patch_update(gains))

    def compute(self) -> TailPatchResult:
        """The gain for all test examples so far."""
        return _tail_patch_compute(dim_zero_cat(self.gains), *self.bootstrap)
