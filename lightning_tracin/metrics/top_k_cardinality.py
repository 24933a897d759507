"""Are different training examples shown for different test examples?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.strongest import strongest
from lightning_tracin.metrics.functional.top_k_cardinality import _top_k_cardinality_compute


class TopKCardinality(AttributionMetric):
    """The size of the union of all test examples' k strongest proponents, over n_test times k.

    See `functional.top_k_cardinality` for what it means. ``update`` takes ``scores`` (n, n_train) of a batch of test
    examples, of which k indices each are kept; ``compute`` returns a scalar.

    Args:
        k: how many proponents of each test example.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = TopKCardinality(k=2)
        >>> metric.update(torch.tensor([[0.9, 0.1, 0.5]]))
        >>> metric.update(torch.tensor([[0.8, 0.7, 0.3]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    chosen: list[Tensor]

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = whole_number("k", k)
        self._add_rows("chosen", torch.int64, dims=2)

    def update(self, scores: Tensor) -> None:
        """Takes a batch of test examples."""
        self.chosen.append(strongest(scores, self.k))

    def compute(self) -> Tensor:
        """The share of different proponents for all test examples so far."""
        return _top_k_cardinality_compute(dim_zero_cat(self.chosen))
