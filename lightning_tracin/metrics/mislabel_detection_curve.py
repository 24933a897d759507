"""How many of the mislabelled examples are found by inspecting the most suspicious ones?"""

from __future__ import annotations

from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE, plot_curve

from lightning_tracin.metrics.functional.mislabel_detection_curve import (
    MislabelCurve,
    _mislabel_detection_curve_compute,
)
from lightning_tracin.metrics.suspicion import Suspicion


class MislabelDetectionCurve(Suspicion):
    """The share of mislabelled examples found against the share inspected, and the area below.

    See `functional.mislabel_detection_curve` for what it means. ``update`` takes ``values`` (n,) and ``mislabelled``
    (n,) bool of a batch of training examples; ``compute`` returns a named tuple ``(inspected, found, area)``.

    Args:
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = MislabelDetectionCurve()
        >>> metric.update(torch.tensor([0.9, 0.2, 0.8]), torch.tensor([True, False, False]))
        >>> metric.update(torch.tensor([0.1, 0.3]), torch.tensor([False, True]))
        >>> metric.compute().area
        tensor(0.6500)
    """

    def compute(self) -> MislabelCurve:
        """The curve for all training examples so far."""
        return _mislabel_detection_curve_compute(*self._seen())

    def _draw(self, val: MislabelCurve, ax: _AX_TYPE | None) -> _PLOT_OUT_TYPE:
        """Draws the curve."""
        labels = ("Share inspected", "Share of the mislabelled found")
        return plot_curve((val.inspected, val.found, val.inspected), val.area, ax, labels, name=type(self).__name__)
