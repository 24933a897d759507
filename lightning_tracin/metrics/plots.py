"""Curves over the number of removed examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE, plot_curve

from lightning_tracin.metrics.functional.bootstrap import Interval


def plot_over_ks(
    ks: Sequence[int], curve: Tensor, interval: Interval, what: str, ax: _AX_TYPE | None
) -> _PLOT_OUT_TYPE:
    """Draws a curve and its interval.

    Args:
        ks: numbers of removed examples.
        curve: (n_k,).
        interval: (n_k,) each.
        what: says on the y-axis what the curve is.
        ax: axes to draw on; None for new ones.

    Returns:
        The figure (None where ``ax`` was given) and its axes.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    removed = torch.tensor(ks)
    axes: Any  # torchmetrics types it as one or several
    figure, axes = plot_curve((removed, curve, removed), ax=ax, label_names=("Removed examples", what))
    axes.fill_between(removed, interval.low.cpu(), interval.high.cpu(), alpha=0.2)
    return figure, axes
