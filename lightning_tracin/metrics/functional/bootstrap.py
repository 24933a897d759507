"""Intervals by the bootstrap."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import real_number, whole_number
from lightning_tracin.metrics.functional.correlations import precise


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
    """The percentile interval of a mean over test examples, or over test examples and seeds, of each column.

    Test examples and seeds are drawn independently of each other (the pigeonhole bootstrap, Owen 2007, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1 (2)): what one retraining says of several test examples is no independent
    evidence. Deviations of n draws are enlarged by sqrt(n / (n - 1)), so that they have an unbiased variance. Beside
    Student's interval this one is still narrower: by a fifteenth for 20 test examples and one seed, by three tenths for
    5.

    Args:
        values: (n, c), rows that are independent of each other; or (n, s, c) of s seeds, of which each has a part in
            all rows.
        level: how often the interval should hold the truth.
        resamples: how many times rows, and seeds, are drawn.
        seed: of the generator that draws them; no other is touched.

    Raises:
        ValueError: ``level`` is not between 0 and 1, ``resamples`` not 1 or more, or ``seed`` not 0 or more.

    Returns:
        The ends, (c,) each, float32; NaN of a single value, which says nothing of others.

    Example:
        >>> bootstrap_interval(torch.arange(20.0).unsqueeze(1))
        Interval(low=tensor([6.7812]), high=tensor([12.2188]))
    """
    level, resamples, seed = checked_bootstrap(level, resamples, seed)
    values = precise(values.unsqueeze(1) if values.ndim == 2 else values)
    n, s, _ = values.shape
    generator = torch.Generator().manual_seed(seed)
    of_rows, of_seeds = (_drawn(each, resamples, generator).to(values) for each in (n, s))
    means = torch.einsum("rn,nsc,rs->rc", of_rows, values, of_seeds)
    tail = (1 - level) / 2
    ends = means.quantile(torch.tensor([tail, 1 - tail]).to(means), dim=0).float()
    return Interval(ends[0], ends[1]) if n * s > 1 else Interval(*torch.full_like(ends, torch.nan))


def _drawn(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How much each of n counts in means of n draws, (resamples, n)."""
    if n == 1:
        return torch.ones(resamples, 1)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    shares = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n)) / n
    return 1 / n + (shares - 1 / n) * math.sqrt(n / (n - 1))
