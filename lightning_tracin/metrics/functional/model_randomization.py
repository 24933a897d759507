"""Do scores depend on what the model has learned?"""

from __future__ import annotations

from torch import Tensor

from lightning_tracin.metrics.functional.checks import check_finite, warn_of_constant
from lightning_tracin.metrics.functional.correlations import correlation, ranks, standardised


def _model_randomization_update(scores: Tensor, randomized: Tensor) -> Tensor:
    """The rank correlations (b,) of a batch of test examples."""
    check_finite("scores", scores, "(n_test, n_train)", (2,))
    check_finite("randomized", randomized, "(n_test, n_train)", (2,))
    if randomized.shape != scores.shape:
        raise ValueError(
            f"Argument `randomized` expected to be of shape {tuple(scores.shape)}, as `scores`, "
            f"but got {tuple(randomized.shape)}."
        )
    first, second = standardised(ranks(scores.T)), standardised(ranks(randomized.T))
    warn_of_constant("scores", first.eq(0).all(0), "training examples", "their correlation counts 0")
    warn_of_constant("randomized", second.eq(0).all(0), "training examples", "their correlation counts 0")
    return correlation(first, second)


def model_randomization(scores: Tensor, randomized: Tensor) -> Tensor:
    """The rank correlation of scores with those of a model with random weights (Hanawa et al. 2021).

    Far below 1 is good: scores that stay alike when all that was learned is gone say something about the texts, and
    nothing about the model.

    Args:
        scores: (n_test, n_train).
        randomized: (n_test, n_train), of the same method for the same examples with the model's weights drawn anew.

    Raises:
        TypeError: a tensor is not of floating-point numbers.
        ValueError: the shapes differ, or values are not finite.

    Warns:
        UserWarning: a test example's scores are all the same (it counts 0).

    Returns:
        A scalar from -1 to 1, the mean over test examples of the correlation over training examples.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1, 0.5, -0.2], [0.1, 0.2, 0.3, 0.4]])
        >>> model_randomization(scores, torch.tensor([[0.9, 0.1, -0.2, 0.5], [0.4, 0.3, 0.2, 0.1]]))
        tensor(-0.4000)
    """
    return _model_randomization_update(scores, randomized).mean().float()
