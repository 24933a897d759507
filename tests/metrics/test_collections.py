"""Metrics of one collection, which torchmetrics updates together where it takes them for the same."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_tracin.metrics import (
    Brittleness,
    ClassDetection,
    CommonWordShare,
    LeaveOneOutCorrelation,
    LinearDatamodelingScore,
    MislabelDetectionAUROC,
    NoiseDetectionRate,
    RecallAtK,
)
from lightning_tracin.retraining import random_halves

N_TRAIN = 20
LABELS = torch.arange(N_TRAIN) % 2
SUBSETS = random_halves(N_TRAIN, 12)


def alike_at_first(n):
    """Scores of two test examples that all options agree on, then n of chance."""
    generator = torch.Generator().manual_seed(1)
    first = (torch.tensor([[0], [1]]) == LABELS).float() + torch.linspace(0, 0.1, N_TRAIN)
    return first, torch.rand(n, N_TRAIN, generator=generator)


def batches_of_labels():
    first, others = alike_at_first(8)
    return [(first, torch.tensor([0, 1])), (others, torch.arange(8) % 2)]


def batches_of_marks():
    first, others = alike_at_first(8)
    relevant = torch.rand(8, N_TRAIN, generator=torch.Generator().manual_seed(2)) < 0.3
    relevant[:, 0] = True
    return [(first, first == first.amax(1, keepdim=True)), (others, relevant)]


def batches_of_predictions():
    return [
        (torch.ones(1, 2, dtype=torch.long), torch.tensor([1])),
        (torch.tensor([[1, 0], [0, 0]]), torch.tensor([1, 1])),
    ]


def batches_of_words():
    return [(torch.tensor([[9, 8]]),), (torch.tensor([[3, 5], [4, 4]]),)]


def batches_of_outputs(m):
    first, others = alike_at_first(4)
    generator = torch.Generator().manual_seed(3)
    outputs = [torch.randn(m, n, generator=generator) for n in (2, 4)]
    return [(torch.ones_like(first), outputs[0]), (others, outputs[1])]


@pytest.mark.filterwarnings("ignore:Argument `.*` expected to vary")
@pytest.mark.parametrize(
    ("first", "second", "batches"),
    [
        (lambda: ClassDetection(LABELS, k=1), lambda: ClassDetection(LABELS, k=5), batches_of_labels()),
        (lambda: RecallAtK(3), lambda: RecallAtK(3, "share"), batches_of_marks()),
        (lambda: Brittleness((5, 10)), lambda: Brittleness((5, 20)), batches_of_predictions()),
        (
            lambda: CommonWordShare(torch.tensor([3])),
            lambda: CommonWordShare(torch.tensor([4, 5])),
            batches_of_words(),
        ),
        (
            lambda: LeaveOneOutCorrelation(torch.arange(12)),
            lambda: LeaveOneOutCorrelation(torch.arange(1, 13)),
            batches_of_outputs(12),
        ),
        (
            lambda: LinearDatamodelingScore(SUBSETS),
            lambda: LinearDatamodelingScore(SUBSETS.roll(1, 1)),
            batches_of_outputs(12),
        ),
    ],
)
def test_two_metrics_with_other_options_are_not_taken_for_one(first, second, batches):
    collection = MetricCollection({"first": first(), "second": second()})
    alone = {"first": first(), "second": second()}
    for batch in batches:
        collection.update(*batch)
        for each in alone.values():
            each.update(*batch)
    together = collection.compute()
    assert len(collection.compute_groups) == 2
    for name, each in alone.items():
        torch.testing.assert_close(together[name], each.compute(), equal_nan=True)


def test_nor_are_two_classes_whose_states_have_the_same_names():
    scores, labels = batches_of_labels()[0]
    collection = MetricCollection([RecallAtK(3), ClassDetection(LABELS, k=3)])
    collection.update(scores=scores, test_labels=labels, relevant=torch.ones(2, N_TRAIN, dtype=torch.bool))
    assert len(collection.compute_groups) == 2


def test_metrics_that_keep_the_same_are_updated_once():
    collection = MetricCollection([MislabelDetectionAUROC(), NoiseDetectionRate()])
    collection.update(torch.rand(10), torch.arange(10) < 3)
    assert len(collection.compute_groups) == 1
