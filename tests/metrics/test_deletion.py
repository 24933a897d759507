"""Case deletion, brittleness and tail-patch, by hand and by what intervals promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
    without_seeds = deletion_curve(changes.mean(1), ks=(10, 20, 50, 100))
    torch.testing.assert_close(without_seeds.interval, found.interval)


def test_intervals_are_percentiles_of_resampled_tests():
    changes = torch.randn(12, 2, 3)
    found = deletion_curve(changes, ks=(1, 2, 3), level=0.9, resamples=20_000)
    means = changes.mean(1).numpy()
    generator = np.random.default_rng(0)
    resampled = means[generator.integers(12, size=(20_000, 12))].mean(1)
    low, high = np.quantile(resampled, (0.05, 0.95), axis=0)
    assert found.curve_interval.low.tolist() == pytest.approx(low, abs=0.01)
    assert found.curve_interval.high.tolist() == pytest.approx(high, abs=0.01)
    low, high = np.quantile(resampled.mean(1), (0.05, 0.95))
    assert [float(end) for end in found.interval] == pytest.approx([low, high], abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = [
        bool(interval.low <= 0 <= interval.high)
        for interval in (bootstrap_interval(torch.randn(40, 1), resamples=400, seed=draw) for draw in range(400))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.035)


def test_the_noise_of_seeds_widens_the_interval():
    worth, few, many = torch.randn(200, 1, 1), torch.randn(200, 1, 2), torch.randn(200, 64, 2)
    widths = [
        float(each[1] - each[0]) for each in (deletion_curve(worth + noise, (1, 2)).interval for noise in (few, many))
    ]
    assert widths[0] / widths[1] == pytest.approx((1.5 / (1 + 0.5 / 64)) ** 0.5, rel=0.15)


def test_the_bootstrap_draws_from_its_own_generator():
    changes = torch.randn(5, 2)
    state = torch.get_rng_state()
    first, second = deletion_curve(changes, (1, 2)), deletion_curve(changes, (1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.interval == second.interval
    assert deletion_curve(changes, (1, 2), seed=1).interval != first.interval


def test_one_test_example_over_its_seeds():
    """What `does it matter` asks of one prediction: seeds in the place of test examples."""
    changes = torch.tensor([-0.4, -0.5, -0.3, -0.45, -0.35]).view(1, 5, 1)
    low, high = deletion_curve(changes, (20,)).interval
    assert low == high  # of one test example nothing can be drawn
    over_seeds = deletion_curve(changes[0].unsqueeze(1), (20,))
    assert over_seeds.auc == pytest.approx(-0.4)
    assert -0.5 < over_seeds.interval.low < -0.4 < over_seeds.interval.high < -0.3


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
