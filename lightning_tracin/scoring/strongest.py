"""The strongest training examples of each test example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor


class TopK(NamedTuple):
    """The strongest training examples of each test example, both (n_test, k), strongest first."""

    values: Tensor
    indices: Tensor


def strongest(scores: Tensor, k: int, *, largest: bool) -> TopK:
    """The k largest or smallest of each row, and where; of equal ones, those that come first."""
    least = scores.topk(k, dim=1, largest=largest).values[:, -1:]
    columns = torch.nonzero((scores >= least if largest else scores <= least).any(0))[:, 0]  # few: the rest is quick
    scores = scores[:, columns]
    beyond = scores > least if largest else scores < least
    equal = scores == least
    chosen = beyond | (equal & (equal.cumsum(1) <= k - beyond.sum(1, keepdim=True)))
    places = torch.nonzero(chosen)[:, 1].view(-1, k)  # ascending: topk alone takes any of equal scores
    order = scores.gather(1, places).sort(dim=1, descending=largest, stable=True)
    return TopK(order.values, columns[places.gather(1, order.indices)])


def top_of(scores: Tensor, start: int, k: int) -> tuple[TopK, TopK]:
    """The k strongest proponents and opponents of a block of scores, fewer where it has fewer; on the CPU.

    Args:
        scores: (n_test, block) scores of the training examples from ``start`` on.
        start: training index of the block's first column.
        k: how many.
    """
    sides = (strongest(scores, min(k, scores.shape[1]), largest=largest) for largest in (True, False))
    proponents, opponents = (TopK(side.values.cpu(), side.indices.cpu() + start) for side in sides)
    return proponents, opponents


def merge_top(parts: Sequence[tuple[TopK, TopK]], k: int) -> tuple[TopK, TopK]:
    """The k strongest proponents and opponents of all parts; of equal ones, those of earlier parts."""
    merged = []
    for side, largest in enumerate((True, False)):
        values = torch.cat([part[side].values for part in parts], dim=1)
        best = strongest(values, min(k, values.shape[1]), largest=largest)
        indices = torch.cat([part[side].indices for part in parts], dim=1)
        merged.append(TopK(best.values, indices.gather(1, best.indices)))
    return merged[0], merged[1]


def clipped_k(k: Any, n_train: int) -> int:
    """``k``, or the number of training examples where there are fewer, with a warning.

    Raises:
        ValueError: if ``k`` is under 1.
    """
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, but got {k!r}.")
    if k > n_train:
        rank_zero_warn(f"k={k} is larger than the training set: all {n_train} training examples are kept.")
    return min(int(k), n_train)
