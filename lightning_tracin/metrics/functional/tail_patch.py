"""Tail-patch: does one more step on a proponent make the target likelier?"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_tracin.metrics.functional.bootstrap import Interval, bootstrap_interval
from lightning_tracin.metrics.functional.checks import check_finite
from lightning_tracin.metrics.functional.correlations import precise


class TailPatchResult(NamedTuple):
    """What single steps on proponents gained.

    Attributes:
        mean: mean gain over test examples and proponents.
        interval: of ``mean``, over test examples.
        per_test: (n_test,) mean over each test example's proponents.
        per_rank: (k,) mean over test examples, of the strongest proponent first.
    """

    mean: Tensor
    interval: Interval
    per_test: Tensor
    per_rank: Tensor


def _tail_patch_update(gains: Tensor) -> Tensor:
    """The gains (b, k) of a batch of test examples."""
    check_finite("gains", gains, "(n_test, k)", (2,))
    return precise(gains)


def _tail_patch_compute(gains: Tensor, level: float, resamples: int, seed: int) -> TailPatchResult:
    per_test = gains.mean(1)
    ends = bootstrap_interval(per_test.unsqueeze(1), level, resamples, seed)
    return TailPatchResult(
        per_test.mean().float(), Interval(ends.low[0], ends.high[0]), per_test.float(), gains.mean(0).float()
    )


def tail_patch(gains: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> TailPatchResult:
    """The mean gain of the target's probability by one optimizer step on each of k proponents (Chang et al. 2024).

    Each step begins at the trained model. This needs no retraining, and tells cause from likeness; but it asks what
    *more* training on an example would do, not what its absence would have done.

    Args:
        gains: (n_test, k) probability (or log-probability) of the target after the step minus before, of the strongest
            proponent first.
        level: of the interval.
        resamples: of the bootstrap over test examples.
        seed: of the bootstrap.

    Raises:
        TypeError: ``gains`` is no tensor of floating-point numbers.
        ValueError: it has another shape, or is not finite.

    Example:
        >>> import torch
        >>> result = tail_patch(torch.tensor([[0.04, 0.02], [0.01, -0.01], [0.03, 0.03]]))
        >>> result.mean, result.per_rank
        (tensor(0.0200), tensor([0.0267, 0.0133]))
        >>> result.interval
        Interval(low=tensor(-0.0045), high=tensor(0.0322))
    """
    return _tail_patch_compute(_tail_patch_update(gains), level, resamples, seed)
