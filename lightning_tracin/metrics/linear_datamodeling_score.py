"""The linear datamodeling score (LDS): do summed scores tell the order of models that were trained on subsets?"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.checks import check_length
from lightning_tracin.metrics.functional.linear_datamodeling_score import (
    LDSResult,
    _linear_datamodeling_score_compute,
    _linear_datamodeling_score_update,
    check_subsets,
    class_counts,
)


class LinearDatamodelingScore(AttributionMetric):
    """The rank correlation of summed scores and what models say that were trained on subsets.

    See `functional.linear_datamodeling_score` for what it means. ``update`` takes ``scores`` (n, n_train) and
    ``outputs`` (m, n) or (m, seeds, n), higher is better, of a batch of test examples; of each m sums and outputs are
    kept. ``compute`` returns a named tuple ``(mean, per_test, se_subsets, se_tests, ceiling, reliability,
    leave_one_out)``.

    Args:
        subsets: (m, n_train) bool, which training examples each model was trained on.
        within: (n_train,) int, the training examples' labels, for the score within classes.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> subsets = torch.rand(40, 100, generator=torch.Generator().manual_seed(0)) < 0.5
        >>> scores = torch.randn(20, 100, generator=torch.Generator().manual_seed(1))
        >>> noise = torch.randn(40, 2, 20, generator=torch.Generator().manual_seed(2))
        >>> outputs = (subsets.float() @ scores.T).unsqueeze(1) + 4 * noise
        >>> metric = LinearDatamodelingScore(subsets)
        >>> metric.update(scores[:12], outputs[..., :12])
        >>> metric.update(scores[12:], outputs[..., 12:])
        >>> metric.compute().mean
        tensor(0.8683)
    """

    plot_lower_bound = -1.0
    drawn = "mean"

    subsets: Tensor
    within: Tensor | None
    predicted: list[Tensor]
    outputs: list[Tensor]

    def __init__(self, subsets: Tensor, within: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_subsets(subsets, within)
        self.register_buffer("subsets", subsets, persistent=False)
        self.register_buffer("within", within, persistent=False)
        self._tell_apart(subsets)
        self._add_rows("predicted", dims=2)
        self._add_rows("outputs", dims=3)

    def update(self, scores: Tensor, outputs: Tensor) -> None:
        """Takes a batch of test examples."""
        predicted, actual = _linear_datamodeling_score_update(scores, self.subsets, outputs)
        if self.outputs:
            check_length("outputs", actual.shape[1], self.outputs[0].shape[1], "seeds of the batches before")
        self.predicted.append(predicted)
        self.outputs.append(actual)

    def compute(self) -> LDSResult:
        """The score for all test examples so far."""
        counts = None if self.within is None else class_counts(self.subsets, self.within)
        return _linear_datamodeling_score_compute(dim_zero_cat(self.predicted), dim_zero_cat(self.outputs), counts)

    def _draw(self, val: LDSResult | list[LDSResult], ax: _AX_TYPE | None) -> _PLOT_OUT_TYPE:
        """Draws one mean or several in their order, with standard errors over subsets, and the ceiling where known."""
        axes: Any  # torchmetrics types it as one or several
        figure, axes = super()._draw(val, ax)
        results = val if isinstance(val, list) else [val]
        for place, result in enumerate(results):
            axes.errorbar(place, float(result.mean), float(result.se_subsets), color="gray", capsize=4, zorder=0)
        if (ceiling := results[-1].ceiling) is not None:
            axes.axhline(float(ceiling), color="gray", linestyle="--", label="ceiling")
            axes.legend()
        return figure, axes
