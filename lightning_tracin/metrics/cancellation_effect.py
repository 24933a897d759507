"""How much do the gradients of a layer cancel?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.cancellation_effect import (
    _cancellation_effect_compute,
    _cancellation_effect_update,
)
from lightning_tracin.metrics.functional.checks import check_length


class CancellationEffect(AttributionMetric):
    """The sum of all training examples' gradient norms over the norm of their sum, both L1.

    See `functional.cancellation_effect` for what it means. ``update`` takes ``gradients`` (n, n_parameters) of a batch
    of training examples, of which only the sum is kept; ``compute`` returns a scalar.

    Args:
        n_parameters: the size of one example's gradient.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> metric = CancellationEffect(n_parameters=2)
        >>> metric.update(torch.tensor([[1.0, -2.0], [1.0, 1.0]]))
        >>> metric.update(torch.tensor([[-1.0, 0.0]]))
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better = False
    plot_lower_bound = 1.0
    plot_upper_bound = None

    sum_of_norms: Tensor
    gradient: Tensor

    def __init__(self, n_parameters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_parameters = whole_number("n_parameters", n_parameters)
        self.add_state("sum_of_norms", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gradient", default=torch.zeros(self.n_parameters, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gradients: Tensor) -> None:
        """Takes a batch of training examples."""
        sum_of_norms, gradient = _cancellation_effect_update(gradients)
        check_length("gradients", len(gradient), self.n_parameters, "parameters of `n_parameters`")
        self.sum_of_norms += sum_of_norms
        self.gradient += gradient

    def compute(self) -> Tensor:
        """The effect for all training examples so far."""
        return _cancellation_effect_compute(self.sum_of_norms, self.gradient)
