"""The linear datamodeling score (LDS): do summed scores tell the order of models that were trained on subsets?"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_tracin.metrics.functional.checks import (
    check_finite,
    check_length,
    check_mask,
    check_whole,
    warn_of_constant,
)
from lightning_tracin.metrics.functional.correlations import (
    column_space,
    correlation,
    precise,
    ranks,
    ranks_without,
    residuals,
    settled,
    standardised,
)

FEWEST = 4  # subsets: the jackknife leaves one out, and ranks of two have no correlation but 1 and -1
ENOUGH = 8  # subsets, below which a correlation of ranks is mostly chance


class LDSResult(NamedTuple):
    """What retraining on subsets says of scores.

    Attributes:
        mean: the mean of ``per_test``, from -1 to 1.
        per_test: (n_test,) rank correlation, over the subsets, of a test example's summed scores and its output.
        se_subsets: standard error of the mean over subsets, by the jackknife: what other subsets would change. Test
            examples share the retrained models, which ``se_tests`` does not see: this one is the honest error.
        se_tests: standard error of the mean over test examples, as if they were independent; infinite for one alone.
        ceiling: what perfect scores would reach: retraining with another seed gives another output. None of one seed.
        reliability: mean rank correlation, over the subsets, of two seeds' outputs. None of one seed.
        leave_one_out: (m,) the mean without each subset, from which ``se_subsets`` is made, and the error of a
            difference of two such means (`linear_datamodeling_difference`).
    """

    mean: Tensor
    per_test: Tensor
    se_subsets: Tensor
    se_tests: Tensor
    ceiling: Tensor | None
    reliability: Tensor | None
    leave_one_out: Tensor


def check_subsets(subsets: Tensor, within: Tensor | None) -> None:
    """Refuses what are no subsets, and classes that are not those of the training examples."""
    check_mask("subsets", subsets, "(m, n_train)", (2,))
    if within is not None:
        check_whole("within", within, "(n_train,)", (1,))
        check_length("within", len(within), subsets.shape[1], "training examples of `subsets`")


def _linear_datamodeling_score_update(scores: Tensor, subsets: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What remains of a batch of test examples: summed scores (b, m) and outputs (b, seeds, m).

    Args:
        scores: (b, n_train).
        subsets: (m, n_train) bool.
        outputs: (m, b) or (m, seeds, b).
    """
    check_finite("scores", scores, "(n_test, n_train)", (2,))
    check_finite("outputs", outputs, "(m, n_test) or (m, seeds, n_test)", (2, 3))
    check_length("scores", scores.shape[1], subsets.shape[1], "training examples of `subsets`")
    check_length("outputs", outputs.shape[0], subsets.shape[0], "subsets of `subsets`")
    check_length("outputs", outputs.shape[-1], scores.shape[0], "test examples of `scores`")
    outputs = outputs.unsqueeze(1) if outputs.ndim == 2 else outputs
    return precise(scores) @ precise(subsets).T, precise(outputs).permute(2, 1, 0)


def class_counts(subsets: Tensor, within: Tensor) -> Tensor:
    """How many examples (m, classes) of each class a subset has."""
    is_of_class = within.unsqueeze(1) == torch.unique(within)
    return precise(subsets) @ precise(is_of_class)


def _linear_datamodeling_score_compute(predicted: Tensor, outputs: Tensor, counts: Tensor | None) -> LDSResult:
    """The score of all test examples.

    Args:
        predicted: (n_test, m) summed scores.
        outputs: (n_test, seeds, m).
        counts: (m, classes) what is regressed out of both sides.
    """
    _check_left(predicted.shape[1], counts)
    predicted, actual = settled(predicted.T), settled(outputs.mean(1).T)
    first, second = (standardised(ranks(_left(each, counts))) for each in (predicted, actual))
    warn_of_constant("scores", first.eq(0).all(0), "subsets that they are summed over", "their LDS counts 0")
    warn_of_constant("outputs", second.eq(0).all(0), "subsets", "their LDS counts 0")
    per_test = correlation(first, second)
    left_out = _leave_one_out(predicted, actual, counts)
    n_test, seeds = outputs.shape[:2]
    se_tests = per_test.std() / n_test**0.5 if n_test > 1 else torch.full_like(per_test.mean(), torch.inf)
    reliability = _reliability(outputs, counts) if seeds > 1 else None
    ceiling = None if reliability is None else _ceiling(reliability, seeds)
    return LDSResult(
        per_test.mean().float(),
        per_test.float(),
        _jackknife(left_out).float(),
        se_tests.float(),
        None if ceiling is None else ceiling.float(),
        None if reliability is None else reliability.float(),
        left_out.float(),
    )


def _check_left(m: int, counts: Tensor | None) -> None:
    """Refuses to correlate what has no degrees of freedom left, and warns of few."""
    used = 0 if counts is None else column_space(counts).shape[1]
    but = f" less the {used} that the class counts of `within` take up" if used else ""
    if m - used < FEWEST:
        raise ValueError(f"Argument `subsets` expected to have {FEWEST} subsets or more, but got {m}{but}.")
    if m - used < ENOUGH:
        rank_zero_warn(f"The LDS is of {m} subsets{but}: below {ENOUGH} it is mostly chance.", UserWarning)


def _left(values: Tensor, counts: Tensor | None) -> Tensor:
    """What is ranked of the values (m, n): all, or what the class counts do not explain."""
    return values if counts is None else residuals(values, counts)


def _leave_one_out(predicted: Tensor, actual: Tensor, counts: Tensor | None) -> Tensor:
    """The mean (m,) over test examples without each subset."""
    m = len(predicted)
    if counts is None:
        ranked = [(each, ranks(each)) for each in (predicted, actual)]
        pairs = ([ranks_without(*each, row) for each in ranked] for row in range(m))
    else:
        others = ([at for at in range(m) if at != row] for row in range(m))
        pairs = ([ranks(residuals(each[kept], counts[kept])) for each in (predicted, actual)] for kept in others)
    return torch.stack([correlation(standardised(first), standardised(second)).mean() for first, second in pairs])


def _jackknife(left_out: Tensor) -> Tensor:
    """The standard error of a mean, from that (m,) without each of the m subsets."""
    return ((len(left_out) - 1) * left_out.var(correction=0)).sqrt()


def _reliability(outputs: Tensor, counts: Tensor | None) -> Tensor:
    """The mean correlation of two seeds' outputs (n_test, seeds, m), over all pairs of seeds and test examples."""
    ranked = [standardised(ranks(_left(each.T, counts))) for each in outputs.unbind(1)]
    return torch.stack([correlation(first, second).mean() for first, second in combinations(ranked, 2)]).mean()


def _ceiling(reliability: Tensor, seeds: int) -> Tensor:
    """What perfect scores reach against the mean of several seeds: Spearman and Brown's formula, and its root."""
    one = reliability.clamp_min(0)
    return (seeds * one / (1 + (seeds - 1) * one)).sqrt()


def linear_datamodeling_score(
    scores: Tensor, subsets: Tensor, outputs: Tensor, within: Tensor | None = None
) -> LDSResult:
    """The rank correlation of summed scores and what models say that were trained on subsets (Park et al. 2023).

    For each of m subsets of the training set a model was trained, and asked about the test examples. Scores are good
    if the sum of a subset's scores tells which models do better on a test example: their Spearman correlation over the
    subsets, averaged over test examples.

    Args:
        scores: (n_test, n_train), positive for proponents.
        subsets: (m, n_train) bool, which training examples each model was trained on.
        outputs: (m, n_test) or (m, seeds, n_test) what the models say, **higher is better**: the log-probability of the
            label, or the negative loss. Several seeds for one subset are averaged.
        within: (n_train,) int, the training examples' labels. The number of examples of each class in a subset explains
            much of a model's output, without any method's help. With ``within`` what is linear in these numbers is
            taken away from both sides before they are ranked: what is left is the score within classes. (Ranked first,
            two sides that both follow the counts would keep the curvature of their ranks in common.)

    Raises:
        TypeError: a tensor is of another type.
        ValueError: shapes do not go together, values are not finite, or there are fewer than 4 subsets, beside those
            that the class counts take up.

    Warns:
        UserWarning: there are fewer than 8 subsets, or sums or outputs are the same for all of them (and count 0).

    Example:
        >>> subsets = torch.rand(40, 100, generator=torch.Generator().manual_seed(0)) < 0.5
        >>> scores = torch.randn(20, 100, generator=torch.Generator().manual_seed(1))
        >>> noise = torch.randn(40, 2, 20, generator=torch.Generator().manual_seed(2))
        >>> outputs = (subsets.float() @ scores.T).unsqueeze(1) + 4 * noise
        >>> result = linear_datamodeling_score(scores, subsets, outputs)
        >>> result.mean, result.se_subsets
        (tensor(0.8683), tensor(0.0094))
        >>> result.reliability, result.ceiling
        (tensor(0.6008), tensor(0.8664))
    """
    check_subsets(subsets, within)
    predicted, actual = _linear_datamodeling_score_update(scores, subsets, outputs)
    return _linear_datamodeling_score_compute(
        predicted, actual, None if within is None else class_counts(subsets, within)
    )


def linear_datamodeling_difference(first: LDSResult, second: LDSResult) -> tuple[Tensor, Tensor]:
    """By how much the first scores' LDS is above the second's, and the standard error of that over subsets.

    Two methods are measured by the same models, whose chances they share: their difference is known much better than
    either of the two.

    Args:
        first: the result of one method.
        second: that of another, on the same subsets in the same order, and the same test examples.

    Raises:
        ValueError: the results are of other numbers of subsets or test examples.

    Example:
        >>> subsets = torch.rand(40, 100, generator=torch.Generator().manual_seed(0)) < 0.5
        >>> scores = torch.randn(20, 100, generator=torch.Generator().manual_seed(1))
        >>> outputs = subsets.float() @ scores.T
        >>> good = linear_datamodeling_score(scores, subsets, outputs)
        >>> coarse = linear_datamodeling_score(scores.sign(), subsets, outputs)
        >>> linear_datamodeling_difference(good, coarse)
        (tensor(0.1975), tensor(0.0115))
    """
    check_length("second", len(second.leave_one_out), len(first.leave_one_out), "subsets of `first`")
    check_length("second", len(second.per_test), len(first.per_test), "test examples of `first`")
    return first.mean - second.mean, _jackknife(first.leave_one_out - second.leave_one_out)
