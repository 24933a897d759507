"""What metrics share that compare values of training examples with which of them are mislabelled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.correlations import precise
from lightning_tracin.metrics.functional.mislabel_detection_auroc import check_suspicion


class Suspicion(AttributionMetric):
    """Keeps a value and a mark of each training example, whose batches may come in any order, from any process."""

    values: list[Tensor]
    mislabelled: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_rows("values")
        self._add_rows("mislabelled", torch.bool)

    def update(self, values: Tensor, mislabelled: Tensor) -> None:
        """Takes a batch of training examples: ``values`` (n,) and ``mislabelled`` (n,) bool."""
        check_suspicion(values, mislabelled)
        self.values.append(precise(values))
        self.mislabelled.append(mislabelled.bool())

    def _seen(self) -> tuple[Tensor, Tensor]:
        """The values (n_train,) and marks (n_train,) of all training examples so far."""
        return dim_zero_cat(self.values), dim_zero_cat(self.mislabelled)
