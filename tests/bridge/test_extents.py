"""How much examples hold, and what that says of their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_tracin.bridge.extents import extent_of, rows_of_all
from lightning_tracin.bridge.training_set import TrainingSet


@dataclass
class Item:
    text: str
    label: int


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"ids": [5, 6, 6, 7], "label": 1}, {".ids": (4, 3)}),
        ({"ids": torch.tensor([5, 6, 7, 0, 0, 0])}, {".ids": (4, 4)}),  # one of the padding stays
        ((np.array([0, 0, 3, 4]), 1), {".0": (3, 3)}),
        ({"mask": torch.ones(9, dtype=torch.long)}, {".mask": (1, 1)}),
        ("to be or not to be", {"": (18, 4)}),
        (Item("a b a", 1), {".text": (5, 2)}),
        ({"pair": ["a b", "c"]}, {".pair.0": (3, 2), ".pair.1": (1, 1)}),
        ({"pixels": torch.rand(3, 4), "flag": torch.tensor([True, False])}, {}),
        ({"image": torch.zeros(400, 400, dtype=torch.uint8), "none": None, "empty": []}, {}),
        (object(), {}),
    ],
)
def test_what_an_example_holds(item, expected):
    found = extent_of(item)
    measures = {(name, kind) for name in expected for kind in ("length", "distinct")}
    assert found == {(name, kind): expected[name][kind == "distinct"] for name, kind in measures}


def test_the_measure_that_goes_with_the_rows_is_taken():
    def extent(length, distinct):
        return {("ids", "length"): length, ("ids", "distinct"): distinct}

    few, others = [extent(10, 4), extent(400, 90)], [extent(20, 5), extent(30, 30)]
    assert rows_of_all([20, 800], few, others) == pytest.approx([40, 60])
    assert rows_of_all([8, 180], few, others) == pytest.approx([10, 60])
    assert rows_of_all([7, 7], few, others) == pytest.approx([7, 7])
    assert rows_of_all([0, 0], few, others) == pytest.approx([0, 0])


def test_a_measure_that_some_lack_is_none():
    few, others = [{("a", "length"): 10}, {("a", "length"): 20}], [{("a", "length"): 30}, {}]
    assert rows_of_all([10, 20], few, others) == pytest.approx([15, 15])


class Buckets:
    """Batches of texts of one length each."""

    def __init__(self, lengths, size=4):
        order = np.argsort(lengths, kind="stable").tolist()
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_a_batch_of_one_bucket_is_seen_among_all():
    lengths = np.random.default_rng(0).integers(2, 200, 100)
    rows = [torch.arange(1, length + 1) for length in lengths]
    training_set = TrainingSet(DataLoader(rows, batch_sampler=Buckets(lengths), collate_fn=list))
    training_set.fingerprint()
    first, others = training_set.extents()
    estimated = rows_of_all([len(rows[index]) for index in training_set.first_indices], [*first.values()], others)
    assert len(first) == len(training_set.first_indices)
    assert np.mean(estimated) == pytest.approx(lengths.mean(), rel=0.1)
