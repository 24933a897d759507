"""Case deletion: what becomes of a prediction when a model is trained without its strongest training examples?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.bootstrap import checked_bootstrap
from lightning_tracin.metrics.functional.checks import check_length, growing_ks
from lightning_tracin.metrics.functional.deletion_curve import (
    DeletionResult,
    _deletion_curve_compute,
    _deletion_curve_update,
)
from lightning_tracin.metrics.plots import plot_over_ks


class DeletionCurve(AttributionMetric):
    """The curve of case deletion, its area, and intervals.

    Where proponents were removed (AUC-DEL+) a lower area is better, where opponents were (AUC-DEL-) a higher one.

    See `functional.deletion_curve` for what it means. ``update`` takes ``changes`` (n, n_k) or (n, n_seeds, n_k) of a
    batch of test examples; ``compute`` returns a named tuple ``(curve, auc, interval, curve_interval, per_test)``.

    Args:
        ks: numbers of examples that were removed, growing.
        level: of the intervals.
        resamples: of the bootstrap over test examples and seeds.
        seed: of the bootstrap.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = DeletionCurve(ks=(10, 50))
        >>> metric.update(torch.tensor([[[-0.1, -0.3], [-0.2, -0.4]], [[0.0, -0.1], [0.0, -0.1]]]))
        >>> metric.update(torch.tensor([[[-0.2, -0.2], [0.0, -0.4]]]))
        >>> metric.compute().auc
        tensor(-0.1667)
    """

    higher_is_better = None
    plot_lower_bound = None
    plot_upper_bound = None

    changes: list[Tensor]

    def __init__(
        self,
        ks: Sequence[int],
        *,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ks = growing_ks(ks)
        self.bootstrap = checked_bootstrap(level, resamples, seed)
        self._add_rows("changes", dims=3)

    def update(self, changes: Tensor) -> None:
        """Takes a batch of test examples."""
        changes = _deletion_curve_update(changes, self.ks)
        if self.changes:
            check_length("changes", changes.shape[1], self.changes[0].shape[1], "seeds of the batches before")
        self.changes.append(changes)

    def compute(self) -> DeletionResult:
        """The curve for all test examples so far."""
        return _deletion_curve_compute(dim_zero_cat(self.changes), *self.bootstrap)

    def _draw(self, val: DeletionResult, ax: _AX_TYPE | None) -> _PLOT_OUT_TYPE:
        """Draws the curve and its interval."""
        return plot_over_ks(self.ks, val.curve, val.curve_interval, "Mean change", ax)
