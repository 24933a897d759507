"""What metrics share that are a mean over test examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tracin.metrics.attribution_metric import AttributionMetric


class MeanOverTests(AttributionMetric):
    """Adds up a number for each test example; of a batch nothing else is kept."""

    total: Tensor
    n_test: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("n_test", default=torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, per_test: Tensor) -> None:
        self.total += per_test.sum()
        self.n_test += len(per_test)

    def compute(self) -> Tensor:
        """The mean over all test examples so far."""
        return self.total / self.n_test
