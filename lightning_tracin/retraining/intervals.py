"""Intervals of a mean over a few seeds, and how they are printed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The .975 quantile of Student's t, by degrees of freedom from 1 on; beyond, that of the normal distribution is near.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.960


def student(n: int) -> float:
    """How many standard errors to each side of a mean of n values its 95 % interval reaches, by Student's t.

    Args:
        n: values that are independent of each other; NaN for one.

    Example:
        >>> student(3), student(8), student(100)
        (4.303, 2.365, 1.96)
    """
    if n < 2:
        return math.nan
    return _STUDENT[n - 2] if n - 2 < len(_STUDENT) else _NORMAL


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
