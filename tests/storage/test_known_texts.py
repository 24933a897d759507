"""A stream's examples are known again by their words and labels, also where some words are drawn at random."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_tracin.gradients.texts import Texts
from lightning_tracin.storage.known_texts import KnownTexts


def block(rows, labels=None):
    ids = torch.tensor([each for row in rows for each in row], dtype=torch.long)
    examples = torch.tensor([place for place, row in enumerate(rows) for _ in row], dtype=torch.long)
    numbers = torch.tensor(labels if labels is not None else [torch.nan] * len(rows), dtype=torch.float64)
    return Texts(len(rows), examples, ids, numbers)


def sentences(n=40, seed=0, words=30):
    of = random.Random(seed)
    return [[of.randrange(5, 5 + words) for _ in range(of.randrange(4, 20))] for _ in range(n)]


def check(before, after, labels=None, labels_after=None):
    known = KnownTexts([block(before[:7], labels and labels[:7]), block(before[7:], labels and labels[7:])])
    for start in range(0, len(after), 5):
        known.compare(block(after[start : start + 5], labels_after and labels_after[start : start + 5]))
    known.check()


def masked(rows, share, seed):
    of = random.Random(seed)
    return [[1 if of.random() < share else each for each in row] for row in rows]


def shortened(rows, share, seed):
    of = random.Random(seed)
    return [[each for each in row if of.random() >= share] for row in rows]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("change", "share"), [(masked, 0), (masked, 0.15), (masked, 0.3), (shortened, 0.1)])
def test_the_same_examples_pass(seed, change, share):
    rows = sentences()
    check(change(rows, share, seed), change(rows, share, seed + 100))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("share", [0, 0.15])
def test_another_order_does_not(seed, share):
    rows = sentences()
    shuffled = random.Random(seed).sample(rows, len(rows))
    with pytest.raises(ValueError, match=r"others than before at \d+ of 40 places"):
        check(masked(rows, share, seed), masked(shuffled, share, seed + 100))


def test_two_that_have_changed_places_are_found_where_nothing_is_random():
    rows = sentences()
    rows[11:13] = [5, 6, 7], [8, 9, 10]
    with pytest.raises(ValueError, match=r"at 2 of 40 places, the first of them 11"):
        check(rows, [*rows[:11], rows[12], rows[11], *rows[13:]])


def test_labels_tell_where_there_are_no_words():
    labels = [float(place % 3) for place in range(40)]
    check([[]] * 40, [[]] * 40, labels, labels)
    with pytest.raises(ValueError, match="others than before"):
        check([[]] * 40, [[]] * 40, labels, [*labels[1:], labels[0]])


def test_an_earlier_reading_may_have_ended_before():
    rows = sentences()
    known = KnownTexts([block(rows[:3])])
    known.compare(block(rows))
    known.check()
    KnownTexts([]).check()
