"""Are the training examples that should be found among the strongest?"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_tracin.metrics.functional.checks import check_length, check_mask
from lightning_tracin.metrics.functional.strongest import strongest

Counting = Literal["any", "share"]


def check_counting(counting: str) -> None:
    """Refuses another way to count.

    Raises:
        ValueError: it is not "any" or "share".
    """
    if counting not in ("any", "share"):
        raise ValueError(f'Argument `counting` expected to be "any" or "share", but got {counting!r}.')


def _recall_at_k_update(scores: Tensor, relevant: Tensor, k: int, counting: Counting) -> Tensor:
    """The recall (b,) of each test example."""
    chosen = strongest(scores, k)
    check_mask("relevant", relevant, "(n_test, n_train)", (2,))
    check_length("relevant", relevant.shape[0], scores.shape[0], "test examples of `scores`")
    check_length("relevant", relevant.shape[1], scores.shape[1], "training examples of `scores`")
    relevant = relevant.bool()
    found = relevant.gather(1, chosen).sum(1)
    if counting == "any":
        return (found > 0).float()
    there = relevant.sum(1)
    if not there.all():
        raise ValueError(
            'Argument `relevant` expected to name a training example for each test example with `counting="share"`, '
            f"but got {int((there == 0).sum())} test examples without one."
        )
    return found / there


def recall_at_k(scores: Tensor, relevant: Tensor, k: int = 10, counting: Counting = "any") -> Tensor:
    """How often the k strongest training examples hold a relevant one, or what share of these they hold.

    Args:
        scores: (n_test, n_train), positive for proponents.
        relevant: (n_test, n_train) bool: the training examples that state what a test example asks for; or the
            strongest by an exact method, of which a faster one should find as many as it can.
        k: how many are looked at.
        counting: ``"any"``: whether at least one is found, as Chang et al. (2024) and quanda count facts; ``"share"``:
            the share of the relevant ones that are found.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: shapes do not go together, scores are not finite, there are fewer than k training examples, or, for
            ``"share"``, a test example has nothing relevant.

    Warns:
        UserWarning: a test example's scores are all the same.

    Returns:
        A scalar from 0 to 1, the mean over test examples.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1, 0.5, -0.2], [0.1, 0.2, 0.3, 0.4]])
        >>> relevant = torch.tensor([[True, True, False, False], [True, False, False, False]])
        >>> recall_at_k(scores, relevant, k=2), recall_at_k(scores, relevant, k=2, counting="share")
        (tensor(0.5000), tensor(0.2500))
    """
    check_counting(counting)
    return _recall_at_k_update(scores, relevant, k, counting).mean()
