"""Finding mislabelled examples, by counting pairs, by simulation and by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from lightning_tracin.metrics.functional import (
    mislabel_detection_auroc,
    mislabel_detection_curve,
    noise_detection_rate,
)


@pytest.fixture(autouse=True)
def drawn():
    torch.manual_seed(0)


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_auroc_counts_pairs(ties):
    values, noisy = torch.randn(50), torch.rand(50) < 0.3
    values = values.round() if ties else values
    pairs = values[noisy].unsqueeze(1) - values[~noisy]
    expected = ((pairs > 0).float() + (pairs == 0).float() / 2).mean()
    torch.testing.assert_close(mislabel_detection_auroc(values, noisy), expected)


def test_torchmetrics_auroc_takes_self_influence_for_logits():
    values, noisy = torch.arange(40.0, 80.0), torch.arange(40) >= 30
    assert mislabel_detection_auroc(values, noisy) == 1
    assert binary_auroc(values, noisy.long()) == 0.5


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_curve_of_chance_and_of_the_best(share):
    n = 2000
    noisy = torch.arange(n) < n * share
    areas = torch.stack([mislabel_detection_curve(torch.randn(n), noisy).area for _ in range(40)])
    assert areas.mean() == pytest.approx(0.5, abs=0.015)
    best = mislabel_detection_curve(noisy.float() + torch.rand(n), noisy)
    assert best.area == pytest.approx(1 - share / 2, abs=1e-4)
    assert best.inspected[-1] == best.found[-1] == 1
    assert best.found[int(n * share) - 1] == pytest.approx(1)


def test_ties_are_the_mean_over_their_orders():
    values, noisy = [2.0, 1.0, 1.0, 1.0, 0.0], [False, True, False, False, True]
    curves = []
    for order in permutations(range(5)):
        in_order = sorted(order, key=lambda example: -values[example])  # stable: ties in this permutation's order
        curves.append(np.cumsum([noisy[example] for example in in_order]) / 2)
    expected = np.mean(curves, axis=0)
    assert mislabel_detection_curve(torch.tensor(values), torch.tensor(noisy)).found.tolist() == pytest.approx(expected)
    for at in (0.2, 0.4, 0.6, 0.8):
        rate = noise_detection_rate(-torch.tensor(values), torch.tensor(noisy), at=at)
        assert rate == pytest.approx(expected[round(5 * at) - 1])


def test_noise_detection_rate_by_hand():
    values = torch.randperm(100).float()
    noisy = torch.rand(100) < 0.3
    for at in (0.07, 0.29, 0.58):  # 0.29 * 100 is below 29
        lowest = values.argsort()[: round(100 * at)]
        assert noise_detection_rate(values, noisy, at=at) == pytest.approx(float(noisy[lowest].sum() / noisy.sum()))
    assert noise_detection_rate(values, noisy, at=0.001) == float(noisy[values.argmin()]) / noisy.sum()


def test_votes_that_most_examples_do_not_get():
    """Vote_k is 0 for most examples: where fewer have votes than are looked at, the rest are taken by chance."""
    votes, noisy = torch.zeros(100), torch.arange(100) % 10 == 0
    votes[noisy.nonzero()[:4, 0]] = -5.0
    assert noise_detection_rate(votes, noisy, at=0.2) == pytest.approx(0.4 + 0.6 * 16 / 96)


@pytest.mark.filterwarnings("ignore:Argument `values` expected to vary")
def test_constant_values_are_chance():
    values, noisy = torch.ones(200), torch.arange(200) < 20
    assert mislabel_detection_auroc(values, noisy) == 0.5
    assert mislabel_detection_curve(values, noisy).area == pytest.approx(0.5, abs=1e-4)
    assert noise_detection_rate(values, noisy, at=0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("metric", [mislabel_detection_auroc, mislabel_detection_curve, noise_detection_rate])
def test_values_that_are_all_the_same_are_warned_of(metric):
    with pytest.warns(UserWarning, match="expected to vary over the training examples, but got 0.25 for all 8"):
        metric(torch.full((8,), 0.25), torch.arange(8) < 2)
