"""Intervals by the bootstrap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import real_number, whole_number


class Interval(NamedTuple):
    """The two ends of an interval.

    Attributes:
        low: the lower end.
        high: the upper end.
    """

    low: Tensor
    high: Tensor


class Bootstrap(NamedTuple):
    """How an interval is made.

    Attributes:
        level: how often it should hold the truth.
        resamples: how many times rows are drawn.
        seed: of the generator that draws them.
    """

    level: float
    resamples: int
    seed: int


def checked_bootstrap(level: float, resamples: int, seed: int) -> Bootstrap:
    """The options of an interval.

    Raises:
        ValueError: ``level`` is not between 0 and 1, ``resamples`` not 1 or more, or ``seed`` not 0 or more.
    """
    level = real_number("level", level, above=0, below=1)
    return Bootstrap(level, whole_number("resamples", resamples), whole_number("seed", seed, at_least=0))


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
        ValueError: ``level`` is not between 0 and 1, ``resamples`` not 1 or more, or ``seed`` not 0 or more.

    Returns:
        The ends, (c,) each, float32. Of one row both are that row.

    Example:
        >>> bootstrap_interval(torch.arange(20.0).unsqueeze(1))
        Interval(low=tensor([6.8500]), high=tensor([12.1500]))
    """
    level, resamples, seed = checked_bootstrap(level, resamples, seed)
    n = len(values)
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n))
    means = times.to(values) @ values / n
    tail = (1 - level) / 2
    ends = means.quantile(torch.tensor([tail, 1 - tail]).to(means), dim=0).float()
    return Interval(ends[0], ends[1])
