"""Are the strongest proponents of a test example's class?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.metrics.functional.checks import check_whole
from lightning_tracin.metrics.functional.class_detection import _class_detection_update
from lightning_tracin.metrics.mean_over_tests import MeanOverTests


class ClassDetection(MeanOverTests):
    """The share of same-class examples among the k strongest proponents.

    See `functional.class_detection` for what it means. ``update`` takes ``scores`` (n, n_train) and ``test_labels``
    (n,) of a batch of test examples; ``compute`` returns a scalar.

    Args:
        train_labels: (n_train,) int.
        k: how many proponents.
        kwargs: those of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = ClassDetection(train_labels=torch.tensor([0, 0, 1, 1]), k=2)
        >>> metric.update(torch.tensor([[0.9, 0.1, 0.5, -0.2]]), torch.tensor([0]))
        >>> metric.update(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(0.7500)
    """

    train_labels: Tensor

    def __init__(self, train_labels: Tensor, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole("train_labels", train_labels, "(n_train,)", (1,))
        self.register_buffer("train_labels", train_labels, persistent=False)
        self.k = whole_number("k", k)
        self._tell_apart(train_labels, self.k)

    def update(self, scores: Tensor, test_labels: Tensor) -> None:
        """Takes a batch of test examples."""
        self._add(_class_detection_update(scores, self.train_labels, test_labels, self.k))
