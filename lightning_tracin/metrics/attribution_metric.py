"""What all metrics of this folder share."""

from __future__ import annotations

from typing import Any, ClassVar

from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE


class AttributionMetric(Metric):
    """A metric whose value is a scalar, or a named tuple of which one field is drawn."""

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    drawn: ClassVar[str | None] = None  # the field

    def plot(self, val: Any = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draws one value, or several in their order; of a curve, one with its interval where there is one.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of that; None for ``compute()``.
            ax: axes to draw on; None for new ones.

        Returns:
            The figure (None where ``ax`` was given) and its axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        return self._draw(self.compute() if val is None else val, ax)

    def _draw(self, val: Any, ax: _AX_TYPE | None) -> _PLOT_OUT_TYPE:
        """Draws what ``compute`` returned, or a list of that."""
        if self.drawn is not None:
            val = [getattr(each, self.drawn) for each in val] if isinstance(val, list) else getattr(val, self.drawn)
        return self._plot(val, ax)
