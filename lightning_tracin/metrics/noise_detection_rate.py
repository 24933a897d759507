"""How much of the noise lies among the least helpful training examples?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tracin.checked_numbers import real_number
from lightning_tracin.metrics.functional.noise_detection_rate import _noise_detection_rate_compute
from lightning_tracin.metrics.suspicion import Suspicion


class NoiseDetectionRate(Suspicion):
    """The share of mislabelled examples that are among the lowest values.

    See `functional.noise_detection_rate` for what it means. ``update`` takes ``values`` (n,), of which **low is
    suspicious**, and ``mislabelled`` (n,) bool of a batch of training examples; ``compute`` returns a scalar.

    Args:
        at: the share of the training set that is looked at.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = NoiseDetectionRate(at=0.4)
        >>> values = torch.tensor([0.9, -0.2, 0.8, -0.1, 0.3])
        >>> metric(values, torch.tensor([False, True, False, False, True]))
        tensor(0.5000)
    """

    def __init__(self, at: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.at = real_number("at", at, above=0, below=1)

    def compute(self) -> Tensor:
        """The rate for all training examples so far."""
        return _noise_detection_rate_compute(*self._seen(), self.at)
