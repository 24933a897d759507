"""Collate functions that reorder their batch are refused, and no others."""

from __future__ import annotations

import random
from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from toy import fitted, loader, test_texts

from lightning_tracin.bridge.collated_order import check_order

Pair = namedtuple("Pair", ["ids", "labels"])


@dataclass
class Batch:
    ids: torch.Tensor
    labels: torch.Tensor


class Texts(Dataset):
    """Lists of ids of 1 to 9 words, as equal, as few and as random as they are asked to be."""

    def __init__(self, n=30, *, equal=False, drawn=0.0):
        of = random.Random(0)
        rows = [([of.randint(1, 30) for _ in range(of.randint(1, 9))], of.randint(0, 2)) for _ in range(n)]
        self.rows = [rows[0]] * n if equal else rows
        self.drawn = drawn
        self.read = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.append(index)
        ids, label = self.rows[index]
        return [31 if random.random() < self.drawn else each for each in ids], label


class Fetching(Texts):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def length(row):
    return len(row[0])


SORTS = {
    "ascending": lambda rows: sorted(rows, key=length),
    "descending": lambda rows: sorted(rows, key=length, reverse=True),
    "by a hash": lambda rows: sorted(rows, key=lambda row: hash(tuple(row[0]))),
    "reversed": lambda rows: rows[::-1],
    "none": lambda rows: rows,
}


def padded(rows, to=None):
    ids = torch.zeros(len(rows), to or max(map(length, rows)), dtype=torch.long)
    for row, (each, _) in zip(ids, rows, strict=True):
        row[: len(each)] = torch.tensor(each)
    return ids, torch.tensor([label for _, label in rows])


def masked(rows):
    """As the collator of a masked language model."""
    ids, _ = padded(rows)
    chosen = (torch.rand(ids.shape) < 0.3) & (ids > 0)
    return {"input_ids": ids.where(~chosen, 1), "labels": ids.where(chosen, -100), "attention_mask": ids > 0}


def lengths_apart(rows):
    """Texts in their order, and their lengths in another, for the model to sort by."""
    ids, labels = padded(rows)
    lengths, order = torch.tensor([length(row) for row in rows]).sort(descending=True)
    return ids, lengths, order, labels


FORMS = {
    "a tuple": padded,
    "a list": lambda rows: [*padded(rows)],
    "a named tuple": lambda rows: Pair(*padded(rows)),
    "a dataclass": lambda rows: Batch(*padded(rows)),
    "nested": lambda rows: {
        "inputs": UserDict(zip("ab", padded(rows), strict=True)),
        "number": len(rows),
        "none": None,
    },
    "arrays": lambda rows: [each.numpy() for each in padded(rows)],
    "lists": lambda rows: {"ids": [row[0] for row in rows], "labels": [row[1] for row in rows]},
    "ragged": lambda rows: [torch.tensor(ids) for ids, _ in rows],
    "strings": lambda rows: [" ".join(map(str, ids)) for ids, _ in rows],
    "time first": lambda rows: padded(rows)[0].T,
    "square": lambda rows: padded(rows, to=max(9, len(rows)))[0][:, : len(rows)],
    "square, time first": lambda rows: padded(rows, to=max(9, len(rows)))[0][:, : len(rows)].T,
    "masked at random": masked,
}


def check(data, form, how="none", **options):
    check_order(DataLoader(data, 4, collate_fn=lambda rows: form(SORTS[how](rows)), **options), "training")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("how", SORTS)
def test_only_what_reorders_is_refused(form, how):
    if how == "none":
        check(Texts(), form)
        return
    with pytest.raises(
        ValueError, match=r"function of the training loader, check.*another order.*enforce_sorted=False"
    ):
        check(Texts(), form, how)


def test_data_sets_that_fetch_whole_batches_and_loaders_of_two_or_of_a_part():
    for data, options in ((Fetching(), {}), (Texts(2), {}), (Texts(), {"sampler": SubsetRandomSampler(range(20, 30))})):
        check(data, padded, **options)
        with pytest.raises(ValueError, match="another order"):
            check(data, padded, "ascending", **options)
    assert not set(data.read) & set(range(20))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_at_random_is_never_refused(form, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    for n in (1, 2, 3, 8, 30):
        for equal in (False, True):
            check(Texts(n, equal=equal), form)
            check(Texts(n, equal=equal, drawn=0.2), form)
            check(Texts(n, equal=equal), lambda rows: torch.randint(2, (len(rows),)))
            check(Texts(n, equal=equal), lambda rows: (masked(rows), torch.arange(8), torch.randperm(len(rows))))


def test_lengths_that_are_sorted_apart_from_the_texts_are_not_refused():
    for n in (1, 2, 8, 30):
        check(Texts(n), lengths_apart)
        check(Texts(n, equal=True), lengths_apart)


@pytest.mark.parametrize("how", SORTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equal_examples_are_in_any_order(form, how):
    for n in (1, 2, 8, 30):
        check(Texts(n, equal=True), form, how)


def test_batches_of_one_have_one_order():
    check_order(DataLoader(Texts(), 1, collate_fn=lambda rows: padded(rows[::-1])), "training")
    check_order(DataLoader(Texts(), None), "training")


def test_few_examples_are_read_and_no_random_number_is_drawn():
    data = Texts(1000, drawn=0.1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    check(data, padded)
    looked, collated = data.read[:64], data.read[64:]
    assert looked == [place * 999 // 63 for place in range(64)]
    assert collated == [*collated[:8], *collated[1:8], 0]
    assert set(collated) <= set(looked)
    assert collated[7] == 999
    assert len({len(data.rows[index][0]) for index in collated}) == 8
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def by_first_word(rows):
    return torch.utils.data.default_collate(sorted(rows, key=lambda row: int(row[0][0])))


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_a_training_loader_that_reorders(tmp_path, cache):
    data = loader(shuffle=True, collate_fn=by_first_word)
    message = "training loader, by_first_word, puts the examples of a batch in another order"
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path / "trace", data=data, cache=cache)
    assert not (tmp_path / "trace").exists()
    fit = fitted(tmp_path / "trace", cache="on_demand")
    with pytest.raises(ValueError, match=message):
        fit.influence(loader(test_texts()), train_dataloaders=data)
    assert fit.influence(loader(test_texts())).scores.abs().sum() > 0


def test_a_test_loader_that_reorders(toy):
    with pytest.raises(ValueError, match="test loader, by_first_word, puts the examples of a batch in another order"):
        toy.influence(loader(test_texts(), collate_fn=by_first_word))
