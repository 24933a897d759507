"""The linear datamodeling score against dense formulas, properties, and simulations whose truth is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from metric_peers import spearman

from lightning_tracin.metrics import LinearDatamodelingScore
from lightning_tracin.metrics.functional import linear_datamodeling_difference as difference
from lightning_tracin.metrics.functional import linear_datamodeling_score as lds
from lightning_tracin.metrics.functional.correlations import ranks


@pytest.fixture(autouse=True)
def drawn():
    torch.manual_seed(0)


def problem(m=30, n_train=60, n_test=9, noise=1.0, seeds=None):
    """Scores, subsets, and outputs that are the sums of the scores and noise."""
    scores, subsets = torch.randn(n_test, n_train), torch.rand(m, n_train) < 0.5
    sums = subsets.float() @ scores.T
    spread = noise * sums.std(0)
    if seeds is None:
        return scores, subsets, sums + spread * torch.randn(m, n_test)
    return scores, subsets, sums.unsqueeze(1) + spread * torch.randn(m, seeds, n_test)


def test_sums_themselves():
    scores, subsets, outputs = problem(noise=0)
    assert lds(scores, subsets, outputs).mean == pytest.approx(1)
    assert lds(-scores, subsets, outputs).mean == pytest.approx(-1)
    assert lds(scores, subsets, outputs.exp()).mean == pytest.approx(1)


def test_each_test_example_by_counting_ranks():
    scores, subsets, outputs = problem()
    sums = subsets.double() @ scores.double().T
    expected = [spearman(sums[:, test], outputs[:, test]) for test in range(len(scores))]
    found = lds(scores, subsets, outputs)
    torch.testing.assert_close(found.per_test, torch.tensor(expected).float())
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.se_tests == pytest.approx(np.std(expected, ddof=1) / len(scores) ** 0.5)


def classes(n_train=60):
    return torch.arange(n_train) % 3


@pytest.mark.parametrize("within", [None, classes()], ids=["overall", "within"])
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_the_jackknife_leaves_each_subset_out(within, ties):
    scores, subsets, outputs = problem(m=14)
    if ties:
        scores, outputs = scores.round(), outputs.div(5).round()
    found = lds(scores, subsets, outputs, within)
    left_out = []
    for row in range(14):
        kept = torch.arange(14) != row
        left_out.append(float(lds(scores, subsets[kept], outputs[kept], within).mean))
    assert found.leave_one_out.tolist() == pytest.approx(left_out, abs=1e-6)
    assert found.se_subsets == pytest.approx((13 * np.var(left_out)) ** 0.5, rel=1e-4)


def test_the_error_over_subsets_is_what_other_subsets_change():
    """The mean of the jackknife's errors is the spread of the score over draws of subsets, that of se_tests is not.

    What all test examples share, here how good a model is as a whole, moves their scores together.
    """
    scores = torch.randn(1, 60) + torch.randn(20, 60) / 4
    found = []
    for _ in range(150):
        subsets = torch.rand(24, 60) < 0.5
        quality = 4 * torch.randn(24, 1)
        found.append(lds(scores, subsets, subsets.float() @ scores.T + quality))
    spread = torch.stack([each.mean for each in found]).std()
    assert torch.stack([each.se_subsets for each in found]).mean() == pytest.approx(float(spread), rel=0.25)
    assert torch.stack([each.se_tests for each in found]).mean() < spread / 3


def test_label_counts_explain_nothing_within_classes():
    """The trap: whether labels agree tells much of a model's output, and nothing once counts are regressed out."""
    labels, test_labels = torch.arange(150) % 3, torch.arange(12) % 3
    same = (labels == test_labels.unsqueeze(1)).float()
    own = torch.randn(12, 150) / 5  # of an example's own worth
    subsets = torch.rand(80, 150) < 0.5
    outputs = subsets.float() @ (same + own).T
    assert lds(same, subsets, outputs).mean > 0.8
    with pytest.warns(UserWarning, match="`scores` expected to vary .* 12 of 12"):
        assert lds(same, subsets, outputs, within=labels).mean == 0
    about = same + 1e-3 * torch.randn(12, 150)
    assert lds(about, subsets, outputs).mean > 0.8
    assert abs(lds(about, subsets, outputs, within=labels).mean) < 0.1
    assert lds(same + own, subsets, outputs, within=labels).mean > 0.9
    assert lds(own, subsets, outputs, within=labels).mean > 0.9


def test_within_classes_by_least_squares():
    scores, subsets, outputs = problem(m=25)
    labels = classes()
    counts = np.stack([(subsets & (labels == label)).sum(1).numpy() for label in range(3)], axis=1)
    design = np.concatenate((np.ones((25, 1)), counts), axis=1)
    expected = []
    for test in range(len(scores)):
        sides = subsets.double() @ scores[test].double(), outputs[:, test]
        left = [side.numpy() - design @ np.linalg.lstsq(design, side.numpy(), rcond=None)[0] for side in sides]
        expected.append(spearman(*left))
    assert lds(scores, subsets, outputs, labels).per_test.tolist() == pytest.approx(expected, abs=1e-6)


def test_classes_of_halves_depend_on_each_other():
    """Where all subsets are of one size, the counts of the classes add up to it."""
    scores, _, _ = problem()
    subsets = torch.stack([torch.randperm(60) < 30 for _ in range(20)])
    found = lds(scores, subsets, subsets.float() @ scores.T, classes())
    assert found.mean > 0.99
    # Two of the three counts, and so 6 of the 8 subsets, are left.
    with pytest.warns(UserWarning, match="of 8 subsets less the 2 that the class counts of `within` take up"):
        lds(scores, subsets[:8], subsets[:8].float() @ scores.T, classes())


@pytest.mark.parametrize(("seeds", "ceiling"), [(2, 0.866), (3, 0.905), (10, 0.968)])
def test_the_ceiling_is_what_perfect_scores_reach(seeds, ceiling):
    """Half and half signal and noise: with a reliability of r = .6, EVIDENCE's formula k r / (1 + (k - 1) r)."""
    scores, subsets, outputs = problem(m=200, n_test=40, noise=(1 / 0.62 - 1) ** 0.5, seeds=seeds)
    found = lds(scores, subsets, outputs)
    assert found.reliability == pytest.approx(0.6, abs=0.03)
    assert found.ceiling == pytest.approx(ceiling, abs=0.02)
    assert found.mean == pytest.approx(float(found.ceiling), abs=0.02)
    r = float(found.reliability)
    assert found.ceiling == pytest.approx((seeds * r / (1 + (seeds - 1) * r)) ** 0.5)


def test_reliability_by_pairs_of_seeds():
    scores, subsets, outputs = problem(seeds=3)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [spearman(outputs[:, a, t], outputs[:, b, t]) for a, b in pairs for t in range(len(scores))]
    assert lds(scores, subsets, outputs).reliability == pytest.approx(np.mean(expected))


def test_seeds_are_averaged():
    scores, subsets, outputs = problem(seeds=4)
    several, mean = lds(scores, subsets, outputs), lds(scores, subsets, outputs.mean(1))
    torch.testing.assert_close(several.per_test, mean.per_test)
    assert mean.ceiling is None
    assert mean.reliability is None
    one = lds(scores, subsets, outputs[:, :1])
    torch.testing.assert_close(one.per_test, lds(scores, subsets, outputs[:, 0]).per_test)
    assert one.ceiling is None


def test_seeds_that_disagree_have_a_ceiling_of_0():
    scores, subsets, outputs = problem(noise=0)
    found = lds(scores, subsets, torch.stack((outputs, -2 * outputs), dim=1))
    assert found.reliability == pytest.approx(-1)
    assert found.ceiling == 0


def test_the_difference_of_two_methods():
    scores, subsets, outputs = problem(m=12)
    other = scores + torch.randn_like(scores)
    first, second = lds(scores, subsets, outputs), lds(other, subsets, outputs)
    mean, error = difference(first, second)
    left_out = []
    for row in range(12):
        kept = torch.arange(12) != row
        both = (lds(each, subsets[kept], outputs[kept]).mean for each in (scores, other))
        left_out.append(float(next(both) - next(both)))
    assert mean == pytest.approx(float(first.mean - second.mean))
    assert error == pytest.approx((11 * np.var(left_out)) ** 0.5, rel=1e-3)
    assert difference(first, first) == (0, 0)
    with pytest.raises(ValueError, match="`second` expected to have the 12 subsets of `first`, but got 11"):
        difference(first, lds(scores, subsets[:11], outputs[:11]))


def test_constant_scores_and_outputs_count_0():
    scores, _, outputs = problem()
    scores[2] = 0
    scores[4] = 0.1
    whole = torch.stack([torch.randperm(60) < 30 for _ in range(30)])  # so that constant scores have constant sums
    outputs[:, 7] = 3.0
    with (
        pytest.warns(UserWarning, match="`scores` expected to vary over the subsets.* got 2 of 9"),
        pytest.warns(UserWarning, match="`outputs` expected to vary over the subsets, but got 1 of 9"),
    ):
        found = lds(scores, whole, outputs)
    assert found.per_test[[2, 4, 7]].tolist() == [0, 0, 0]
    assert all(torch.isfinite(each).all() for each in found if each is not None)
    with pytest.warns(UserWarning, match="3 of 3"):
        nothing = lds(torch.ones(3, 60), whole, torch.ones(30, 2, 3))
    assert nothing.mean == nothing.se_subsets == nothing.se_tests == nothing.reliability == nothing.ceiling == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_differs_by_rounding_alone_counts_0(dtype):
    subsets = torch.zeros(40, 200, dtype=torch.bool).scatter_(1, torch.rand(40, 200).argsort(1)[:, :100], True)
    with pytest.warns(UserWarning, match="their LDS counts 0"):
        found = lds(torch.full((5, 200), 0.1, dtype=dtype), subsets, torch.randn(40, 5))
    assert found.per_test.tolist() == [0] * 5
    assert found.leave_one_out.tolist() == [0] * 40


def test_of_one_test_example_classes_have_the_shapes_of_functions():
    scores, subsets, outputs = problem(n_test=1, seeds=2)
    metric = LinearDatamodelingScore(subsets)
    metric.update(scores, outputs)
    expected = lds(scores, subsets, outputs)
    for found in (metric.compute(), metric.compute(), copy.deepcopy(metric).compute(), metric(scores, outputs)):
        assert found.per_test.shape == (1,)
        assert found.mean.shape == ()
        assert torch.equal(found.per_test, expected.per_test)
        assert [float(each) for each in difference(found, expected)] == [0, 0]


def test_few_subsets():
    scores, subsets, outputs = problem()
    with pytest.warns(UserWarning, match="LDS is of 7 subsets: below 8 it is mostly chance"):
        lds(scores, subsets[:7], outputs[:7])
    with pytest.raises(ValueError, match="`subsets` expected to have 4 subsets or more, but got 3"):
        lds(scores, subsets[:3], outputs[:3])
    with pytest.raises(ValueError, match="but got 10 less the 7 that the class counts"):
        lds(scores, subsets[:10], outputs[:10], torch.arange(60) % 7)


def test_one_test_example():
    scores, subsets, outputs = problem(n_test=1)
    found = lds(scores, subsets, outputs)
    assert found.mean == found.per_test
    assert found.se_tests == torch.inf
    assert found.se_subsets.isfinite()


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_scale_does_not_matter(scale):
    scores, subsets, outputs = problem()
    expected = lds(scores, subsets, outputs)
    torch.testing.assert_close(lds(scores * scale, subsets, outputs * scale).per_test, expected.per_test)


def test_half_precision_scores():
    scores, subsets, outputs = problem()
    torch.testing.assert_close(
        lds(scores.bfloat16(), subsets, outputs).mean, lds(scores.bfloat16().double(), subsets, outputs.double()).mean
    )


def test_ranks():
    values = torch.tensor([[3.0, 1.0], [1.0, 1.0], [3.0, 0.0], [2.0, 5.0]])
    assert ranks(values).tolist() == [[3.5, 2.5], [1, 2.5], [3.5, 1], [2, 4]]
