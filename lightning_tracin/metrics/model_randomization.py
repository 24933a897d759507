"""Do scores depend on what the model has learned?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tracin.metrics.functional.model_randomization import _model_randomization_update
from lightning_tracin.metrics.mean_over_tests import MeanOverTests


class ModelRandomization(MeanOverTests):
    """The rank correlation of scores with those of a model with random weights.

    See `functional.model_randomization` for what it means. ``update`` takes ``scores`` and ``randomized``, both (n,
    n_train), of a batch of test examples; ``compute`` returns a scalar.

    Args:
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = ModelRandomization()
        >>> metric.update(torch.tensor([[0.9, 0.1, 0.5, -0.2]]), torch.tensor([[0.9, 0.1, -0.2, 0.5]]))
        >>> metric.update(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
        >>> metric.compute()
        tensor(-0.4000)
    """

    higher_is_better = False
    plot_lower_bound = -1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tell_apart()

    def update(self, scores: Tensor, randomized: Tensor) -> None:
        """Takes a batch of test examples."""
        self._add(_model_randomization_update(scores, randomized))
