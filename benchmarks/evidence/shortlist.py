"""A shortlist of training examples before influence is computed (FastIF, Guo et al. 2021, arXiv 2012.15781)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def shortlist_recall(scores: Tensor, nearness: Tensor, lengths: Sequence[int], top: int = 10) -> list[float]:
    """The share of the strongest proponents that a shortlist of the nearest training examples holds.

    Args:
        scores: (n_test, n_train) influence.
        nearness: (n_test, n_train) similarity, by which the shortlist is made.
        lengths: how many examples it holds.
        top: how many proponents are looked for.

    Returns:
        For each length the mean over test examples.

    Example:
        >>> from torch import tensor
        >>> shortlist_recall(tensor([[4.0, 3.0, 2.0, 1.0]]), tensor([[0.9, 0.1, 0.8, 0.2]]), (1, 2, 4), top=2)
        [0.5, 0.5, 1.0]
    """
    places = nearness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    found = places.gather(1, scores.topk(top, 1).indices)
    return [float((found < length).float().mean()) for length in lengths]
