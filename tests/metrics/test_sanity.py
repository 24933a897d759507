"""Same class, cardinality, randomised models, recall, common words, cancellation: by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from metric_peers import spearman

from lightning_tracin.metrics import functional as F


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(6, 30)


def strongest(row, k):
    return sorted(range(len(row)), key=lambda at: -row[at])[:k]


def test_class_detection_by_hand(scores):
    train, test = torch.randint(3, (30,)), torch.randint(3, (6,))
    hits = [train[at] == label for row, label in zip(scores, test, strict=True) for at in strongest(row, 4)]
    assert F.class_detection(scores, train, test, k=4) == pytest.approx(sum(map(int, hits)) / 24)
    same = (train == test.unsqueeze(1)).float() + torch.rand(6, 30) / 2
    assert F.class_detection(same, train, test, k=3) == 1


def test_cardinality_of_one_story_and_of_different_ones(scores):
    assert F.top_k_cardinality(scores[:1].expand(6, 30), k=5) == pytest.approx(1 / 6)
    assert F.top_k_cardinality(torch.eye(6), k=1) == 1
    chosen = {at for row in scores for at in strongest(row, 5)}
    assert F.top_k_cardinality(scores, k=5) == pytest.approx(len(chosen) / 30)


def test_of_equal_scores_the_first_count():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    relevant = torch.tensor([[False, True, False, False, False]])
    assert F.recall_at_k(scores, relevant, k=1) == 1
    assert F.recall_at_k(scores, relevant.flip(1), k=2) == 0


def test_recall_counts_facts_or_a_share(scores):
    relevant = torch.rand(6, 30) < 0.3
    relevant[0] = torch.arange(30) == scores[0].argmax()
    top = [set(strongest(row, 5)) for row in scores]
    those = [set(row.nonzero().flatten().tolist()) for row in relevant]
    hits = [len(found & all_) for found, all_ in zip(top, those, strict=True)]
    assert F.recall_at_k(scores, relevant, k=5) == pytest.approx(np.mean([hit > 0 for hit in hits]))
    shares = [hit / len(all_) for hit, all_ in zip(hits, those, strict=True)]
    assert F.recall_at_k(scores, relevant, k=5, counting="share") == pytest.approx(np.mean(shares))


def test_a_shortlist_finds_the_strongest_of_another_method(scores):
    """How a truncation is measured: our ten strongest, of which a shortlist of twenty should hold all."""
    ours = torch.zeros(6, 30, dtype=torch.bool).scatter_(1, scores.topk(10).indices, True)
    assert F.recall_at_k(scores, ours, k=20, counting="share") == 1
    assert F.recall_at_k(-scores, ours, k=20, counting="share") == 0


def test_nothing_relevant(scores):
    relevant = torch.ones(6, 30, dtype=torch.bool)
    relevant[3] = False
    assert F.recall_at_k(scores, relevant, k=5) == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match='with `counting="share"`, but got 1 test examples without one'):
        F.recall_at_k(scores, relevant, k=5, counting="share")


def test_randomised_models(scores):
    other = torch.randn(6, 30)
    expected = [spearman(first, second) for first, second in zip(scores, other, strict=True)]
    assert F.model_randomization(scores, other) == pytest.approx(np.mean(expected))
    assert F.model_randomization(scores, 3 * scores + 1) == pytest.approx(1)


def test_common_words_by_hand():
    words = torch.tensor([[0, 1, 7, 8], [2, 9, -1, -1], [-1, -1, -1, -1]])
    assert F.common_word_share(words, common=torch.tensor([0, 1, 2])) == pytest.approx(3 / 6)
    # Padding is no word, whatever is common.
    assert F.common_word_share(words, common=torch.tensor([-1, 0])) == pytest.approx(1 / 6)


def test_cancellation_by_hand():
    gradients = torch.tensor([[3.0, -1.0], [-1.0, 2.0]])
    assert F.cancellation_effect(gradients) == pytest.approx((4 + 3) / (2 + 1))
    assert F.cancellation_effect(gradients.abs()) == 1
    assert F.cancellation_effect(torch.tensor([[1.0], [-1.0]])) == torch.inf


def test_gradients_that_all_but_cancel_are_added_precisely():
    gradients = torch.cat((torch.full((1000, 1), 1e4), torch.full((1000, 1), -1e4), torch.full((1, 1), 1e-3)))
    assert F.cancellation_effect(gradients) == pytest.approx(2e7 / 1e-3, rel=1e-5)
