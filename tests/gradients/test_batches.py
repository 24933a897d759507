"""Copies of batches: what a step takes out of its batch is there again for the next one."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
from still_fits import build
from toy import CLASSES, VOCABULARY, Toy, fitted, loader

from lightning_tracin.gradients.batches import shallow_copy

Pair = namedtuple("Pair", ["inputs", "labels"])


class Popping(Toy):
    """Takes its batch apart."""

    def influence_loss(self, batch):
        inputs, labels = batch
        return super().influence_loss((inputs.pop("ids"), labels))


def test_a_step_may_take_a_nested_batch_apart(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (12, 5), generator=generator)
    nested = [({"ids": row}, int(row[0]) % CLASSES) for row in ids]
    flat = [(row, int(row[0]) % CLASSES) for row in ids]
    found = [
        fitted(tmp_path / kind.__name__, build(kind), loader(data)).influence(loader(data[:3])).scores
        for kind, data in ((Popping, nested), (Toy, flat))
    ]
    assert torch.equal(*found)


def test_mappings_and_lists_are_copied_at_every_level_and_tensors_shared():
    one = torch.ones(2)
    batch = Pair(OrderedDict(a=one, b=[{"c": one}, (one, "text")]), (one, None))
    copied = shallow_copy(batch)
    assert type(copied) is Pair
    assert type(copied.inputs) is OrderedDict
    assert copied.labels is batch.labels  # nothing in it can be taken out
    assert copied.inputs["a"] is one
    copied.inputs["b"][0].pop("c")
    copied.inputs["b"].pop()
    copied.inputs.pop("a")
    assert batch.inputs["b"][0]["c"] is one
    assert len(batch.inputs["b"]) == 2
    assert batch.inputs["a"] is one
