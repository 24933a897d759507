"""Leave-one-out: do scores tell what becomes of a test example without one training example?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_tracin.metrics.functional.checks import check_finite, check_length, check_whole, warn_of_constant
from lightning_tracin.metrics.functional.correlations import correlation, precise, standardised

FEWEST = 3  # removed examples, below which a correlation is 1 or -1
ENOUGH = 8  # removed examples, below which it is mostly chance


class LeaveOneOutResult(NamedTuple):
    """How scores and retraining without single examples agree.

    Attributes:
        mean: the mean of ``per_test``, from -1 to 1.
        per_test: (n_test,) Pearson correlation over the removed examples.
        se_tests: standard error of the mean over test examples, as if they were independent; infinite for one alone.
    """

    mean: Tensor
    per_test: Tensor
    se_tests: Tensor


def _check_removed(removed: Tensor, n_train: int) -> None:
    """Refuses what are no indices of different training examples, and warns of few."""
    check_whole("removed", removed, "(n_removed,)", (1,))
    is_index = (removed >= 0) & (removed < n_train)
    different = len(torch.unique(removed))
    if different < max(FEWEST, len(removed)) or not is_index.all():
        raise ValueError(
            f"Argument `removed` expected to be {FEWEST} or more different indices below {n_train}, the training "
            f"examples of `scores`, but got {different} different ones from {int(removed.min())} to "
            f"{int(removed.max())}."
        )
    if len(removed) < ENOUGH:
        rank_zero_warn(
            f"The correlation is of {len(removed)} removed examples: below {ENOUGH} it is mostly chance.", UserWarning
        )


def _leave_one_out_correlation_update(scores: Tensor, outputs: Tensor, removed: Tensor | None) -> Tensor:
    """The correlations (b,) of a batch of test examples."""
    check_finite("scores", scores, "(n_test, n_train)", (2,))
    check_finite("outputs", outputs, "(n_removed, n_test) or (n_removed, seeds, n_test)", (2, 3))
    removed = torch.arange(scores.shape[1], device=scores.device) if removed is None else removed
    _check_removed(removed, scores.shape[1])
    check_length("outputs", len(outputs), len(removed), "removed training examples")
    check_length("outputs", outputs.shape[-1], len(scores), "test examples of `scores`")
    outputs = precise(outputs)
    predicted = standardised(precise(scores[:, removed].T))
    changes = standardised(-(outputs if outputs.ndim == 2 else outputs.mean(1)))
    warn_of_constant("scores", predicted.eq(0).all(0), "removed examples", "their correlation counts 0")
    warn_of_constant("outputs", changes.eq(0).all(0), "removed examples", "their correlation counts 0")
    return correlation(predicted, changes)


def _leave_one_out_correlation_compute(per_test: Tensor) -> LeaveOneOutResult:
    mean = per_test.mean()
    se_tests = per_test.std() / len(per_test) ** 0.5 if len(per_test) > 1 else torch.full_like(mean, torch.inf)
    return LeaveOneOutResult(mean.float(), per_test.float(), se_tests.float())


def leave_one_out_correlation(scores: Tensor, outputs: Tensor, removed: Tensor | None = None) -> LeaveOneOutResult:
    """The correlation of scores with what models say that were trained without one example each (Koh & Liang 2017).

    One example of thousands changes less than another seed does: average over many seeds, or take the linear
    datamodeling score.

    Args:
        scores: (n_test, n_train), positive for proponents.
        outputs: (n_removed, n_test) or (n_removed, seeds, n_test) what the models say, **higher is better**: the
            log-probability of the label, or the negative loss. Proponents are those without which it is lower.
            Several seeds are averaged.
        removed: (n_removed,) int, which training example each model was trained without; None for each in order.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: shapes do not go together, values are not finite, or fewer than 3 different examples were removed.

    Warns:
        UserWarning: fewer than 8 examples were removed, or a test example's values do not vary (it counts 0).

    Example:
        >>> scores = torch.arange(20.0).view(2, 10) ** 2
        >>> outputs = torch.arange(0.0, -20.0, -1).view(2, 10).T
        >>> leave_one_out_correlation(scores, outputs)
        LeaveOneOutResult(mean=tensor(0.9795), per_test=tensor([0.9627, 0.9962]), se_tests=tensor(0.0168))
    """
    return _leave_one_out_correlation_compute(_leave_one_out_correlation_update(scores, outputs, removed))
