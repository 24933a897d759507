"""The strongest training examples of each test example."""

from __future__ import annotations

from torch import Tensor

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.metrics.functional.checks import check_finite, warn_of_constant


def strongest(scores: Tensor, k: int) -> Tensor:
    """The indices (n_test, k) of the training examples with the highest scores; of equal ones, the first.

    Raises:
        TypeError: ``scores`` is no tensor of floating-point numbers.
        ValueError: it has another shape, is not finite, or has fewer than k columns.

    Warns:
        UserWarning: a test example's scores are all the same.

    Example:
        >>> import torch
        >>> strongest(torch.tensor([[0.1, 0.7, 0.7], [0.3, 0.2, -0.9]]), k=1)
        tensor([[1],
                [0]])
    """
    check_finite("scores", scores, "(n_test, n_train)", (2,))
    k = whole_number("k", k, at_most=scores.shape[1])
    is_constant = scores.amax(1) == scores.amin(1)
    if scores.shape[1] > 1:
        warn_of_constant("scores", is_constant, "training examples", "the first ones are taken for the strongest")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
