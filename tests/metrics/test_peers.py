"""Values equal dattri's and quanda's on the same inputs; where theirs are wrong, a test shows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from metric_peers import (
    dattri_brittleness_order,
    dattri_lds,
    dattri_loo_corr,
    dattri_mislabel_detection_auc,
    quanda_class_detection,
    quanda_global_rank,
    quanda_lds,
    quanda_mislabeling_detection,
    quanda_model_randomization,
    quanda_recall_at_k,
    quanda_tail_patch,
    quanda_top_k_cardinality,
)

from lightning_tracin.metrics import functional as F

TESTS, TRAIN, SUBSETS = 7, 40, 12


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    return torch.randn(TESTS, TRAIN)


@pytest.fixture
def halves():
    """Subsets of one size: indices, as dattri has them, and a mask."""
    torch.manual_seed(1)
    indices = torch.stack([torch.randperm(TRAIN)[: TRAIN // 2] for _ in range(SUBSETS)])
    return indices, torch.zeros(SUBSETS, TRAIN, dtype=torch.bool).scatter_(1, indices, True)


def test_lds(drawn, halves):
    indices, subsets = halves
    outputs = torch.randn(SUBSETS, TESTS) + subsets.float() @ drawn.T / 3
    ours = F.linear_datamodeling_score(drawn, subsets, outputs)
    torch.testing.assert_close(ours.per_test, dattri_lds(drawn.T, (outputs, indices)).float())
    torch.testing.assert_close(ours.mean, quanda_lds(drawn, indices, outputs), rtol=1e-4, atol=1e-5)


def test_lds_with_ties(halves):
    indices, subsets = halves
    scores = torch.randint(3, (TESTS, TRAIN)).float()
    outputs = torch.randint(4, (SUBSETS, TESTS)).float()
    ours = F.linear_datamodeling_score(scores, subsets, outputs).per_test
    torch.testing.assert_close(ours, dattri_lds(scores.T, (outputs, indices)).float())


def test_leave_one_out(drawn):
    losses = torch.randn(TRAIN, TESTS)
    ours = F.leave_one_out_correlation(drawn, -losses).per_test
    torch.testing.assert_close(ours, dattri_loo_corr(drawn.T, (losses, torch.arange(TRAIN))).float())


def test_dattri_does_not_read_which_example_was_removed(drawn):
    removed = torch.randperm(TRAIN)
    losses = drawn[:, removed].T  # without a proponent the loss is higher
    assert F.leave_one_out_correlation(drawn, -losses, removed).mean == pytest.approx(1)
    assert dattri_loo_corr(drawn.T, (losses, removed)).mean() < 0.5


def test_mislabel_detection(drawn):
    values, noisy = drawn[0], torch.rand(TRAIN) < 0.2
    torch.testing.assert_close(F.mislabel_detection_auroc(values, noisy), dattri_mislabel_detection_auc(values, noisy))
    values = values.argsort().argsort().float()  # a whole number apart, which quanda's addition does not change
    curve, area = quanda_mislabeling_detection(quanda_global_rank(values), noisy)
    ours = F.mislabel_detection_curve(values, noisy)
    torch.testing.assert_close(ours.found, curve.float())
    torch.testing.assert_close(ours.area, area.float())


def test_quanda_ranks_by_the_index():
    """Self-influences late in training are small: there quanda's ranking is the training set's order turned round."""
    values, noisy = torch.linspace(1, 0, 100) * 1e-3, torch.arange(100) < 10
    best = F.mislabel_detection_curve(values, noisy).area
    assert best == pytest.approx(0.95 - 1 / 2000)
    _, theirs = quanda_mislabeling_detection(quanda_global_rank(values), noisy)
    assert theirs < 0.1
    _, without = quanda_mislabeling_detection(values.argsort(descending=True), noisy)
    assert without == pytest.approx(float(best))


@pytest.mark.filterwarnings("ignore:Argument `values` expected to vary")
def test_dattri_gives_ties_an_area_by_their_order():
    values, noisy = torch.zeros(20), torch.arange(20) < 5
    assert F.mislabel_detection_auroc(values, noisy) == 0.5
    assert F.mislabel_detection_auroc(values, noisy.flip(0)) == 0.5
    low, high = sorted(float(dattri_mislabel_detection_auc(values, each)) for each in (noisy, noisy.flip(0)))
    assert low < 0.1
    assert high > 0.9


def test_dattri_removes_the_first_example_alone():
    """Scores of the shape that its documentation asks for are ranked along the test examples."""
    scores = torch.tensor([[0.1], [0.9], [0.5]])
    assert np.unique(dattri_brittleness_order(scores)).tolist() == [0]
    assert dattri_brittleness_order(scores[:, 0]).tolist() == [1, 2, 0]


@pytest.mark.parametrize("k", [1, 5, TRAIN])
def test_the_strongest(drawn, k):
    train_labels, test_labels = torch.randint(3, (TRAIN,)), torch.randint(3, (TESTS,))
    theirs = quanda_class_detection(drawn, train_labels, test_labels, k)
    torch.testing.assert_close(F.class_detection(drawn, train_labels, test_labels, k), theirs)
    assert F.top_k_cardinality(drawn, k) == pytest.approx(quanda_top_k_cardinality(drawn, k))
    entailment = torch.rand(TESTS, TRAIN) < 0.1
    assert F.recall_at_k(drawn, entailment, k) == pytest.approx(quanda_recall_at_k(drawn, entailment, k))


def test_model_randomization(drawn):
    other = torch.randn(TESTS, TRAIN) + drawn / 2
    theirs = quanda_model_randomization(drawn, other)
    torch.testing.assert_close(F.model_randomization(drawn, other), theirs, rtol=1e-4, atol=1e-5)


def test_tail_patch(drawn):
    torch.testing.assert_close(F.tail_patch(drawn[:, :5]).mean, quanda_tail_patch(drawn[:, :5]))


def test_peers_themselves(drawn, halves):
    """The formulas in this folder are dattri's, where that is installed (make bench)."""
    dattri = pytest.importorskip("dattri.metric")
    indices, _ = halves
    outputs, noisy = torch.randn(SUBSETS, TESTS), torch.rand(TRAIN) < 0.2
    truth, alone = (outputs, indices), (torch.randn(TRAIN, TESTS), None)
    torch.testing.assert_close(dattri_lds(drawn.T, truth).float(), dattri.lds(drawn.T, truth)[0])
    torch.testing.assert_close(dattri_loo_corr(drawn.T, alone).float(), dattri.loo_corr(drawn.T, alone)[0])
    theirs, _ = dattri.mislabel_detection_auc(drawn[0], noisy)
    torch.testing.assert_close(dattri_mislabel_detection_auc(drawn[0], noisy), theirs)
