"""Losses that depend on the rest of their batch are refused in streams, and where examples come one by one."""

from __future__ import annotations

import logging

import pytest
import torch
from mistakes import Plain
from still_fits import Still
from torch.nn import functional
from torch.utils.data import IterableDataset, default_collate
from toy import N_TRAIN, fitted, loader, texts

ASKED = "could not check on a first batch"


class Stream(IterableDataset):
    def __len__(self):
        return N_TRAIN

    def __iter__(self):
        return iter(texts())


class Centred(Still):
    """Of all losses of a batch, how much each is above their mean."""

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        return losses - losses.detach().mean()

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


class PerExample(Still):
    """Divides what it should not: gradients are each example's own, but half as long in a batch of two."""

    def influence_loss(self, batch):
        return super().influence_loss(batch) / len(batch[1])

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).sum()


def messages(caplog):
    return [each.message for each in caplog.records if ASKED in each.message]


DATA = {
    "a stream": lambda **options: loader(Stream(), **options),
    "one by one": lambda **options: loader(batch_size=1, **options),
}


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize("kind", [Centred, PerExample])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_loss_that_depends_on_its_batch_is_refused(tmp_path, data, kind, cache):
    with pytest.raises(ValueError, match=f"The losses of {kind.__name__} depend on the batch: the loss of training ex"):
        fitted(tmp_path / "trace", kind(), data(), cache=cache)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_one_that_does_not_is_served_without_a_word(tmp_path, caplog, data):
    with caplog.at_level(logging.INFO):
        fitted(tmp_path, Still(), data(), trainer={"max_epochs": 1})
    assert not messages(caplog)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_sum_is_no_mean(tmp_path, data):
    with pytest.raises(ValueError, match="its loss is not a mean of independent losses"):
        fitted(
            tmp_path, Plain(lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum")), data()
        )


def only_one(items):
    (item,) = items
    return default_collate([item])


def the_first(items):
    return default_collate(items[:1])


@pytest.mark.parametrize(
    ("collate", "why"), [(only_one, "ValueError: too many values"), (the_first, "2 training examples has 1 losses")]
)
def test_where_two_cannot_be_put_together_that_is_said(tmp_path, caplog, collate, why):
    with caplog.at_level(logging.INFO):
        fitted(tmp_path, Still(), loader(batch_size=1, collate_fn=collate), trainer={"max_epochs": 1})
    (message,) = messages(caplog)
    assert why in message


def test_a_stream_of_batches_that_cannot_be_cut(tmp_path, caplog):
    """Time first, with as many words as examples in none of them."""

    def transposed(items):
        ids, labels = default_collate(items)
        return ids.T, labels

    class TimeFirst(Still):
        def forward(self, ids):
            return super().forward(ids.T)

    with caplog.at_level(logging.INFO):
        fitted(tmp_path, TimeFirst(), loader(Stream(), collate_fn=transposed), trainer={"max_epochs": 1})
    assert len(messages(caplog)) == 1
    assert torch.get_default_dtype() == torch.float32
