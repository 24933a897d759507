"""The strongest training examples of each test example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.checked_numbers import whole_number


class TopK(NamedTuple):
    """The strongest training examples of each test example, strongest first.

    Attributes:
        values: (n_test, k) float32, their scores.
        indices: (n_test, k) int64, their indices in the training set.
    """

    values: Tensor
    indices: Tensor


def strongest(scores: Tensor, k: int, *, largest: bool) -> TopK:
    """The k largest or smallest scores of each row, and their columns; of equal scores, those of the first columns.

    Args:
        scores: (n_test, n) scores.
        k: how many, at most n.
        largest: whether to take the largest scores, or else the smallest.
    """
    bound = scores.topk(k, dim=1, largest=largest).values[:, -1:]
    # Few columns reach the bound of any row; the exact selection below runs on them alone.
    columns = torch.nonzero((scores >= bound if largest else scores <= bound).any(0))[:, 0]
    scores = scores[:, columns]
    is_beyond = scores > bound if largest else scores < bound
    is_tied = scores == bound
    # Among scores tied at the bound, topk picks arbitrary columns; this takes the first ones.
    is_chosen = is_beyond | (is_tied & (is_tied.cumsum(1) <= k - is_beyond.sum(1, keepdim=True)))
    places = torch.nonzero(is_chosen)[:, 1].view(-1, k)
    order = scores.gather(1, places).sort(dim=1, descending=largest, stable=True)
    return TopK(order.values, columns[places.gather(1, order.indices)])


def top_of(scores: Tensor, examples: Tensor, k: int) -> tuple[TopK, TopK]:
    """The k strongest proponents and opponents in a block of scores, on the CPU; fewer if the block has fewer columns.

    Args:
        scores: (n_test, n_block) scores of some training examples.
        examples: (n_block,) their indices, ascending, on the CPU.
        k: how many proponents, and how many opponents.
    """
    tops = (strongest(scores, min(k, scores.shape[1]), largest=largest) for largest in (True, False))
    proponents, opponents = (TopK(top.values.cpu(), examples[top.indices.cpu()]) for top in tops)
    return proponents, opponents


def merge_top(pairs: Sequence[tuple[TopK, TopK]], k: int) -> tuple[TopK, TopK]:
    """The k strongest of several pairs of proponents and opponents; of equal scores, those of earlier pairs."""
    merged = []
    for side, largest in enumerate((True, False)):
        values = torch.cat([pair[side].values for pair in pairs], dim=1)
        best = strongest(values, min(k, values.shape[1]), largest=largest)
        indices = torch.cat([pair[side].indices for pair in pairs], dim=1)
        merged.append(TopK(best.values, indices.gather(1, best.indices)))
    return merged[0], merged[1]


def clipped_k(k: Any, n_train: int) -> int:
    """``k``, or with a warning the number of training examples if that is smaller.

    Raises:
        ValueError: if ``k`` is not a whole number of at least 1.
    """
    wanted = whole_number("k", k)
    if wanted > n_train:
        rank_zero_warn(f"k={wanted} is larger than the training set: all {n_train} training examples are kept.")
    return min(wanted, n_train)
