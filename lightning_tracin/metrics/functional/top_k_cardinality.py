"""Are different training examples shown for different test examples?"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tracin.metrics.functional.strongest import strongest


def _top_k_cardinality_compute(chosen: Tensor) -> Tensor:
    """The share of different indices among those (n_test, k) that were chosen."""
    return torch.tensor(len(torch.unique(chosen)) / chosen.numel(), device=chosen.device)


def top_k_cardinality(scores: Tensor, k: int = 1) -> Tensor:
    """The size of the union of all test examples' k strongest proponents, over n_test times k (Barshan et al. 2020).

    Near 0 where the same few examples, of large gradients, are shown for every test example. Random
    scores come near 1 where n_test times k is far below n_train; no scores exceed n_train / (n_test k).

    Args:
        scores: (n_test, n_train), positive for proponents.
        k: how many proponents of each test example.

    Raises:
        TypeError: ``scores`` is no tensor of floating-point numbers.
        ValueError: it has another shape, is not finite, or has fewer than k columns.

    Warns:
        UserWarning: a test example's scores are all the same.

    Returns:
        A scalar above 0, at most 1.

    Example:
        >>> top_k_cardinality(torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.3]]), k=2)
        tensor(0.7500)
    """
    return _top_k_cardinality_compute(strongest(scores, k))
