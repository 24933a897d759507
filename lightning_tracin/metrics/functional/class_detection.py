"""Are the strongest proponents of a test example's class?"""

from __future__ import annotations

from torch import Tensor

from lightning_tracin.metrics.functional.checks import check_length, check_whole
from lightning_tracin.metrics.functional.strongest import strongest


def _class_detection_update(scores: Tensor, train_labels: Tensor, test_labels: Tensor, k: int) -> Tensor:
    """The share (b,) of each test example's k strongest that have its label."""
    chosen = strongest(scores, k)
    check_whole("test_labels", test_labels, "(n_test,)", (1,))
    check_length("train_labels", len(train_labels), scores.shape[1], "training examples of `scores`")
    check_length("test_labels", len(test_labels), len(scores), "test examples of `scores`")
    labels = train_labels[chosen]
    return (labels == test_labels.unsqueeze(1)).float().mean(1)


def class_detection(scores: Tensor, train_labels: Tensor, test_labels: Tensor, k: int = 5) -> Tensor:
    """The share of same-class examples among the k strongest proponents (Hanawa et al. 2021; Kwon et al. 2024).

    A check of sanity, not of truth: comparing labels, without any model, reaches 1.

    Args:
        scores: (n_test, n_train), positive for proponents.
        train_labels: (n_train,) int.
        test_labels: (n_test,) int, the labels or predictions that were explained.
        k: how many proponents.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: shapes do not go together, scores are not finite, or there are fewer than k training examples.

    Warns:
        UserWarning: a test example's scores are all the same.

    Returns:
        A scalar from 0 to 1.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1, 0.5, -0.2], [0.1, 0.2, 0.3, 0.4]])
        >>> class_detection(scores, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), k=2)
        tensor(0.7500)
    """
    check_whole("train_labels", train_labels, "(n_train,)", (1,))
    return _class_detection_update(scores, train_labels, test_labels, k).mean()
