"""Are the training examples that should be found among the strongest?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.metrics.functional.recall_at_k import Counting, _recall_at_k_update, check_counting
from lightning_tracin.metrics.mean_over_tests import MeanOverTests


class RecallAtK(MeanOverTests):
    """How often the k strongest training examples hold a relevant one, or what share of these they hold.

    See `functional.recall_at_k` for what it means. ``update`` takes ``scores`` and ``relevant``, both (n, n_train), of
    a batch of test examples; ``compute`` returns a scalar.

    Args:
        k: how many are looked at.
        counting: ``"any"`` or ``"share"``.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = RecallAtK(k=2)
        >>> relevant = torch.tensor([[True, True, False, False], [True, False, False, False]])
        >>> metric(torch.tensor([[0.9, 0.1, 0.5, -0.2], [0.1, 0.2, 0.3, 0.4]]), relevant)
        tensor(0.5000)
    """

    def __init__(self, k: int = 10, counting: Counting = "any", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counting(counting)
        self.k = whole_number("k", k)
        self.counting: Counting = counting
        self._tell_apart(self.k, counting)

    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Takes a batch of test examples."""
        self._add(_recall_at_k_update(scores, relevant, self.k, self.counting))
