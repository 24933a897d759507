"""How many of the words that are shown as reasons say nothing?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tracin.metrics.attribution_metric import AttributionMetric
from lightning_tracin.metrics.functional.checks import check_whole
from lightning_tracin.metrics.functional.common_word_share import (
    _common_word_share_compute,
    _common_word_share_update,
)


class CommonWordShare(AttributionMetric):
    """The share of stop words, punctuation and special tokens among the words that explain pairs of examples.

    See `functional.common_word_share` for what it means. ``update`` takes ``words`` (n_pairs, n_words) int, filled with
    -1; ``compute`` returns a scalar.

    Args:
        common: (n_common,) int, ids of the words that say nothing.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> metric = CommonWordShare(common=torch.tensor([0, 1, 2]))
        >>> metric.update(torch.tensor([[3, 0], [4, -1]]))
        >>> metric.update(torch.tensor([[3, 5, 1]]))
        >>> metric.compute()
        tensor(0.3333)
    """

    higher_is_better = False

    common: Tensor
    is_common: Tensor
    total: Tensor

    def __init__(self, common: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole("common", common, "(n_common,)", (1,))
        self.register_buffer("common", common, persistent=False)
        self._tell_apart(common)
        self.add_state("is_common", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, words: Tensor) -> None:
        """Takes the words of a batch of pairs."""
        is_common, total = _common_word_share_update(words, self.common)
        self.is_common += is_common
        self.total += total

    def compute(self) -> Tensor:
        """The share among all words so far."""
        return _common_word_share_compute(self.is_common, self.total)
