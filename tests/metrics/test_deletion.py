"""Case deletion, brittleness and tail-patch, by hand and by what intervals promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_tracin.metrics import Brittleness, DeletionCurve
from lightning_tracin.metrics.functional import brittleness, deletion_curve, tail_patch
from lightning_tracin.metrics.functional.bootstrap import bootstrap_interval


@pytest.fixture(autouse=True)
def drawn():
    torch.manual_seed(0)


def test_the_mean_over_k_tests_and_seeds():
    changes = torch.randn(6, 3, 4)
    found = deletion_curve(changes, ks=(10, 20, 50, 100))
    torch.testing.assert_close(found.curve, changes.mean((0, 1)))
    torch.testing.assert_close(found.auc, changes.mean())
    torch.testing.assert_close(found.per_test, changes.mean((1, 2)))
    one_seed, no_seeds = (deletion_curve(each, (10, 20, 50, 100)) for each in (changes[:, :1], changes[:, 0]))
    torch.testing.assert_close(one_seed.interval, no_seeds.interval)


def test_intervals_are_percentiles_of_resampled_tests_and_seeds():
    changes = torch.randn(12, 4, 3)
    found = deletion_curve(changes, ks=(1, 2, 3), level=0.9, resamples=20_000)
    generator = np.random.default_rng(0)
    drawn = [generator.multinomial(n, [1 / n] * n, size=20_000) / n for n in (12, 4)]
    tests, seeds = (1 / n + (each - 1 / n) * (n / (n - 1)) ** 0.5 for n, each in zip((12, 4), drawn, strict=True))
    resampled = np.einsum("rt,tsk,rs->rk", tests, changes.numpy(), seeds)
    low, high = np.quantile(resampled, (0.05, 0.95), axis=0)
    assert found.curve_interval.low.tolist() == pytest.approx(low, abs=0.01)
    assert found.curve_interval.high.tolist() == pytest.approx(high, abs=0.01)
    low, high = np.quantile(resampled.mean(1), (0.05, 0.95))
    assert [float(end) for end in found.interval] == pytest.approx([low, high], abs=0.01)


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_intervals_hold_the_truth_about_as_often_as_they_say(shared):
    """Of 20 test examples with 5 seeds, also where half of the noise is of a retraining that all of them share."""
    held = []
    for draw in range(300):
        noise = shared**0.5 * torch.randn(1, 5, 1) + (1 - shared) ** 0.5 * torch.randn(20, 5, 1)
        low, high = deletion_curve(torch.randn(20, 1, 1) + noise, (1,), resamples=300, seed=draw).interval
        held.append(bool(low <= 0 <= high))
    assert 0.87 < np.mean(held) < 0.995


def test_an_interval_of_one_dimension_has_the_unbiased_variance():
    values = torch.randn(5, 1, dtype=torch.float64)
    low, high = bootstrap_interval(values, level=0.68268949, resamples=50_000)
    assert float(high - low) / 2 == pytest.approx(float(values.std()) / 5**0.5, rel=0.1)


def test_the_bootstrap_draws_from_its_own_generator():
    changes = torch.randn(5, 2)
    state = torch.get_rng_state()
    first, second = deletion_curve(changes, (1, 2)), deletion_curve(changes, (1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.interval == second.interval
    assert deletion_curve(changes, (1, 2), seed=1).interval != first.interval


def test_one_test_example_over_its_seeds():
    changes = torch.tensor([-0.4, -0.5, -0.3, -0.45, -0.35]).view(1, 5, 1)
    over_seeds = deletion_curve(changes, (20,))
    assert over_seeds.auc == pytest.approx(-0.4)
    assert -0.5 < over_seeds.interval.low < -0.4 < over_seeds.interval.high < -0.3


def test_a_single_value_says_nothing_of_others():
    found = deletion_curve(torch.tensor([[-0.4]]), (20,))
    assert found.auc == pytest.approx(-0.4)
    assert found.interval.low.isnan()
    assert found.interval.high.isnan()
    assert tail_patch(torch.tensor([[0.1, 0.2]])).interval.low.isnan()


def test_curves_of_one_k_are_curves():
    pytest.importorskip("matplotlib").use("Agg")
    deletion, flips = DeletionCurve(ks=(50,)), Brittleness(ks=(50,))
    changes = torch.randn(8, 3, 1)
    deletion.update(changes)
    flips.update(torch.tensor([[0], [1], [1], [1]]), torch.zeros(4).long())
    curve, share = deletion.compute().curve, flips.compute().share
    assert curve.shape == share.shape == deletion.compute().curve_interval.low.shape == (1,)
    torch.testing.assert_close(curve, changes.mean((0, 1)))
    assert share.tolist() == [0.75]
    for metric in (deletion, flips):
        _, ax = metric.plot()
        assert ax.lines[0].get_xdata().tolist() == [50]


def test_brittleness_by_hand():
    predictions = torch.tensor([[0, 0, 1, 0], [2, 2, 2, 2], [1, 1, 1, 1], [0, 3, 3, 3]])
    found = brittleness(predictions, predictions[:, 0], ks=(0, 20, 40, 60))
    assert found.smallest.tolist() == [40, torch.inf, torch.inf, 20]
    assert found.share.tolist() == [0, 0.25, 0.5, 0.5]
    labels = torch.tensor([0, 2, 0, 0])  # the third is wrong from the start
    against_labels = brittleness(predictions, labels, ks=(0, 20, 40, 60))
    assert against_labels.smallest.tolist() == [40, torch.inf, 0, 20]


def test_brittleness_is_the_first_flip_of_a_search():
    """dattri's search: the first k for which the prediction is not the label."""
    ks = tuple(range(0, 200, 20))
    predictions, labels = torch.randint(4, (50, len(ks))), torch.randint(4, (50,))
    predictions[:25] = labels[:25, None]
    predictions[:10, 6:] += 1
    expected = [
        next((k for k, said in zip(ks, row, strict=True) if said != label), torch.inf)
        for row, label in zip(predictions.tolist(), labels.tolist(), strict=True)
    ]
    assert brittleness(predictions, labels, ks).smallest.tolist() == expected


def test_more_than_half_of_the_seeds_must_flip():
    predictions = torch.tensor([[[0, 1], [1, 1]], [[1, 1], [1, 0]]])  # two tests, two seeds, two ks
    assert brittleness(predictions, torch.tensor([0, 0]), ks=(5, 10)).smallest.tolist() == [10, 5]


def test_tail_patch_by_hand():
    gains = torch.randn(30, 5)
    found = tail_patch(gains)
    torch.testing.assert_close(found.mean, gains.mean())
    torch.testing.assert_close(found.per_test, gains.mean(1))
    torch.testing.assert_close(found.per_rank, gains.mean(0))
    assert found.interval.low < found.mean < found.interval.high
    torch.testing.assert_close(found.interval, deletion_curve(gains.mean(1, keepdim=True), (1,)).interval)
