"""Case deletion: what becomes of a prediction when a model is trained without its strongest training examples?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tracin.metrics.functional.bootstrap import Interval, bootstrap_interval
from lightning_tracin.metrics.functional.checks import check_finite, check_length, growing_ks
from lightning_tracin.metrics.functional.correlations import precise


class DeletionResult(NamedTuple):
    """What removing examples changes.

    Attributes:
        curve: (n_k,) mean change over test examples, at each k.
        auc: the mean of the curve: AUC-DEL+ where proponents were removed (far below 0 is good), AUC-DEL- where
            opponents were (above 0 is good).
        interval: of ``auc``, the two ends.
        curve_interval: of ``curve``, (n_k,) each.
        per_test: (n_test,) each test example's mean over k and seeds.
    """

    curve: Tensor
    auc: Tensor
    interval: Interval
    curve_interval: Interval
    per_test: Tensor


def _deletion_curve_update(changes: Tensor, ks: Sequence[int]) -> Tensor:
    """The changes (b, n_seeds, n_k) of a batch of test examples."""
    check_finite("changes", changes, "(n_test, n_k) or (n_test, n_seeds, n_k)", (2, 3))
    check_length("changes", changes.shape[-1], len(ks), "numbers of removed examples of `ks`")
    return precise(changes.unsqueeze(1) if changes.ndim == 2 else changes)


def _deletion_curve_compute(changes: Tensor, level: float, resamples: int, seed: int) -> DeletionResult:
    areas = changes.mean(2, keepdim=True)
    ends = bootstrap_interval(torch.cat((changes, areas), dim=2), level, resamples, seed)
    return DeletionResult(
        changes.mean((0, 1)).float(),
        areas.mean().float(),
        Interval(ends.low[-1], ends.high[-1]),
        Interval(ends.low[:-1], ends.high[:-1]),
        areas.mean((1, 2)).float(),
    )


def deletion_curve(
    changes: Tensor, ks: Sequence[int], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> DeletionResult:
    """The curve of case deletion, its area, and intervals (Yeh et al. 2022).

    For each test example a model was trained without its k strongest proponents (or opponents), with each of a few
    seeds. The area is the mean over ``ks``, as in the paper.

    Args:
        changes: (n_test, n_k) or (n_test, n_seeds, n_k) change of the target's probability (or log-probability):
            without the k examples minus with all, for one and the same seed.
        ks: numbers of examples that were removed, growing.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap, which takes no random number from elsewhere.

    The bootstrap draws test examples, and seeds independently of them: retrainings of one seed that several test
    examples share, above all the one with nothing removed, move all of them together. Of test examples with a single
    seed each the interval knows nothing of that, and is too narrow. Of one test example it is over its seeds.

    Raises:
        TypeError: ``changes`` is no tensor of floating-point numbers.
        ValueError: shapes do not go together, values are not finite, or ``ks`` do not grow.

    Example:
        >>> first, second = [[-0.1, -0.3], [-0.2, -0.4]], [[0.0, -0.1], [0.0, -0.1]]  # two seeds, k = 10 and 50
        >>> third = [[-0.2, -0.2], [0.0, -0.4]]
        >>> changes = torch.tensor([first, second, third])
        >>> result = deletion_curve(changes, ks=(10, 50))
        >>> result.curve, result.auc
        (tensor([-0.0833, -0.2500]), tensor(-0.1667))
        >>> result.interval
        Interval(low=tensor(-0.3008), high=tensor(-0.0238))
    """
    ks = growing_ks(ks)
    return _deletion_curve_compute(_deletion_curve_update(changes, ks), level, resamples, seed)
