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
    """Each test example's curve (b, n_k): the mean of its seeds."""
    check_finite("changes", changes, "(n_test, n_k) or (n_test, n_seeds, n_k)", (2, 3))
    check_length("changes", changes.shape[-1], len(ks), "numbers of removed examples of `ks`")
    return precise(changes if changes.ndim == 2 else changes.mean(1))


def _deletion_curve_compute(curves: Tensor, level: float, resamples: int, seed: int) -> DeletionResult:
    per_test = curves.mean(1)
    ends = bootstrap_interval(torch.cat((curves, per_test.unsqueeze(1)), dim=1), level, resamples, seed)
    return DeletionResult(
        curves.mean(0).float(),
        per_test.mean().float(),
        Interval(ends.low[-1], ends.high[-1]),
        Interval(ends.low[:-1], ends.high[:-1]),
        per_test.float(),
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

    The bootstrap draws test examples; their seeds were averaged before, so that the noise between seeds is a part of
    the spread between test examples. For the interval of *one* test example over its seeds, pass these in the place of
    test examples: ``changes[i].unsqueeze(1)``.

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
        Interval(low=tensor(-0.2500), high=tensor(-0.0500))
    """
    ks = growing_ks(ks)
    return _deletion_curve_compute(_deletion_curve_update(changes, ks), level, resamples, seed)
