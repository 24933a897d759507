"""How much do the gradients of a layer cancel?"""

from __future__ import annotations

from torch import Tensor

from lightning_tracin.metrics.functional.checks import check_finite
from lightning_tracin.metrics.functional.correlations import precise


def _cancellation_effect_update(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the norms, and the sum (d,) of the gradients, of a batch of training examples."""
    check_finite("gradients", gradients, "(n_train, n_parameters)", (2,))
    gradients = precise(gradients)
    return gradients.abs().sum(), gradients.sum(0)


def _cancellation_effect_compute(sum_of_norms: Tensor, gradient: Tensor) -> Tensor:
    if sum_of_norms == 0:
        raise ValueError("Argument `gradients` expected to hold a gradient that is not 0, but got none.")
    return (sum_of_norms / gradient.abs().sum()).float()


def cancellation_effect(gradients: Tensor) -> Tensor:
    """The sum of all training examples' gradient norms over the norm of their sum, both L1 (Yeh et al. 2022).

    The paper explains by it why the last layer's scores mislead: there gradients of different examples are large and
    cancel. Whether it predicts which layer is best is contested (arXiv 2511.04715).

    Args:
        gradients: (n_train, n_parameters) of one layer.

    Raises:
        TypeError: ``gradients`` is no tensor of floating-point numbers.
        ValueError: it has another shape, is not finite, or holds nothing but 0.

    Returns:
        A scalar, 1 or more; infinite where the sum is 0.

    Example:
        >>> import torch
        >>> cancellation_effect(torch.tensor([[1.0, -2.0], [1.0, 1.0], [-1.0, 0.0]]))
        tensor(3.)
    """
    return _cancellation_effect_compute(*_cancellation_effect_update(gradients))
