"""Intervals of a mean over a few seeds, and how they are printed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def student(n: int, together: int = 1) -> float:
    """How many standard errors to each side of a mean of n values its 95 % interval reaches, by Student's t.

    Args:
        n: values that are independent of each other; NaN for one.
        together: of so many means, all of which shall lie in their intervals with 95 % (Bonferroni).

    Example:
        >>> [round(student(n), 3) for n in (3, 8, 100)], round(student(8, together=10), 3)
        ([4.303, 2.365, 1.984], 4.029)
    """
    if n < 2:
        return math.nan
    lower, upper = 0.0, 1e6
    while upper - lower > 1e-9 * upper:
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if _outside(middle, n - 1) > 0.05 / together else (lower, middle)
    return upper


def _outside(t: float, freedom: int) -> float:
    """The probability that Student's t is farther from 0 than t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

    Args:
        t: not negative.
        freedom: its degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1)
    total = 0.0
    for number in range(freedom // 2):
        total += term
        term *= (2 * number + 1 + odd) / (2 * number + 2 + odd) * math.cos(angle) ** 2
    return 1 - (2 / math.pi * (angle + total) if odd else total)


def half_width(values: Tensor) -> Tensor:
    """Half the width of the 95 % interval of a mean, by Student's t.

    Args:
        values: (..., s), of s seeds that are independent of each other.

    Returns:
        (...): the mean lies, with 95 % confidence, within so much of that of the values; NaN of one seed.

    Example:
        >>> half_width(torch.tensor([0.3, 0.4, 0.5]))  # 4.303 * 0.1 / sqrt(3)
        tensor(0.2484)
    """
    n = values.shape[-1]
    if n < 2:
        return torch.full(values.shape[:-1], torch.nan)
    return values.std(-1) * (student(n) / math.sqrt(n))
