"""Intervals by the bootstrap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tracin.metrics.functional.checks import check_count, check_share
from lightning_tracin.metrics.functional.correlations import precise


class Interval(NamedTuple):
    """The two ends of an interval.

    Attributes:
        low: the lower end.
        high: the upper end.
    """

    low: Tensor
    high: Tensor


def check_bootstrap(level: float, resamples: int) -> None:
    """Refuses an interval that cannot be made.

    Raises:
        ValueError: ``level`` is not between 0 and 1, or ``resamples`` is not 1 or more.
    """
    check_share("level", level)
    check_count("resamples", resamples)


def bootstrap_interval(values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The percentile interval of the mean over the first dimension, of each column.

    The same rows are drawn for all columns. Beside Student's interval this one is narrower: by a tenth for 20 rows,
    by a third for 5.

    Args:
        values: (n, c), rows that are independent of each other.
        level: how often the interval should hold the truth.
        resamples: how many times n rows are drawn.
        seed: of the generator that draws them; no other is touched.

    Raises:
        ValueError: ``level`` is not between 0 and 1, or ``resamples`` is not 1 or more.

    Returns:
        The ends, (c,) each, float32. Of one row both are that row.

    Example:
        >>> bootstrap_interval(torch.arange(20.0).unsqueeze(1))
        Interval(low=tensor([6.8500]), high=tensor([12.1500]))
    """
    check_bootstrap(level, resamples)
    n = len(values)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n))
    values = precise(values)
    means = times.to(values) @ values / n
    tail = (1 - level) / 2
    ends = means.quantile(torch.tensor([tail, 1 - tail]).to(means), dim=0).float()
    return Interval(ends[0], ends[1])
