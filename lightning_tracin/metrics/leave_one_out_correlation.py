"""Leave-one-out: do scores tell what becomes of a test example without one training example?"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.checks import check_whole
from lightning_tracin.metrics.functional.leave_one_out_correlation import (
    LeaveOneOutResult,
    _leave_one_out_correlation_compute,
    _leave_one_out_correlation_update,
)


class LeaveOneOutCorrelation(AttributionMetric):
    """The correlation of scores with what models say that were trained without one example each.

    See `functional.leave_one_out_correlation` for what it means. ``update`` takes ``scores`` (n, n_train) and
    ``outputs`` (n_removed, n) or (n_removed, seeds, n), higher is better, of a batch of test examples; of each a number
    is kept. ``compute`` returns a named tuple ``(mean, per_test, se_tests)``.

    Args:
        removed: (n_removed,) int, which training example each model was trained without; None for each in order.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = LeaveOneOutCorrelation()
        >>> scores = torch.arange(20.0).view(2, 10) ** 2
        >>> outputs = torch.arange(0.0, -20.0, -1).view(2, 10).T
        >>> metric.update(scores[:1], outputs[:, :1])
        >>> metric.update(scores[1:], outputs[:, 1:])
        >>> metric.compute().mean
        tensor(0.9795)
    """

    plot_lower_bound = -1.0
    drawn = "mean"

    removed: Tensor | None
    per_test: list[Tensor]

    def __init__(self, removed: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if removed is not None:
            check_whole("removed", removed, "(n_removed,)", (1,))
        self.register_buffer("removed", removed, persistent=False)
        self._tell_apart(removed)
        self._add_rows("per_test")

    def update(self, scores: Tensor, outputs: Tensor) -> None:
        """Takes a batch of test examples."""
        self.per_test.append(_leave_one_out_correlation_update(scores, outputs, self.removed))

    def compute(self) -> LeaveOneOutResult:
        """The correlation for all test examples so far."""
        return _leave_one_out_correlation_compute(dim_zero_cat(self.per_test))
