"""Checks look at examples that differ: a collate function or a loss that treats a few of them otherwise is found."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from still_fits import Still, build
from torch.nn import functional
from torch.utils.data import Dataset, SubsetRandomSampler
from toy import VOCABULARY, fitted, loader

from lightning_tracin.bridge.collated_order import check_order
from lightning_tracin.bridge.looks import UNSEEN, differing, look_of
from lightning_tracin.bridge.training_set import TrainingSet


class Rare(Dataset):
    """Texts of 7 words with labels 0 and 1, but for one in so many; notes what is read in which process."""

    def __init__(self, n=200, *, every=20, at=7, length=7, label=2, folder=None):
        of = torch.Generator().manual_seed(2)
        self.ids = torch.randint(1, VOCABULARY, (n, 7), generator=of)
        self.labels = torch.randint(2, (n,), generator=of)
        self.every, self.at, self.length, self.label = every, at, length, label
        self.read = []

    def __len__(self):
        return len(self.ids)

    def is_rare(self, index):
        return index % self.every == self.at

    def __getitem__(self, index):
        self.read.append(index)
        if self.is_rare(index):
            return self.ids[index, : self.length], self.label
        return self.ids[index], int(self.labels[index])


def padded(items):
    ids, labels = zip(*items, strict=True)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor(labels)


def sorting(items):
    return padded(sorted(items, key=lambda item: len(item[0])))


def sorting_downwards(items):
    return padded(sorted(items, key=lambda item: -len(item[0])))


def rare_lengths(at=3, **options):
    return Rare(every=10, at=at, length=4, label=1, **options)


@pytest.mark.parametrize("collate", [sorting, sorting_downwards])
@pytest.mark.parametrize("at", range(10))
def test_a_collate_function_that_sorts_is_found_where_few_lengths_differ(collate, at):
    check_order(loader(rare_lengths(at), collate_fn=padded), "test")
    with pytest.raises(ValueError, match="another order"):
        check_order(loader(rare_lengths(at), collate_fn=collate), "test")
    training_set = TrainingSet(loader(rare_lengths(at), collate_fn=collate))
    with pytest.raises(ValueError, match="another order"):
        check_order(training_set.loader, "training", training_set.looked)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_fit_and_a_query_with_it_are_refused(tmp_path, toy, n_workers):
    data = loader(rare_lengths(), batch_size=8, collate_fn=sorting, num_workers=n_workers)
    with pytest.raises(ValueError, match="collate function of the training loader, sorting, puts the examples"):
        fitted(tmp_path, data=data)
    with pytest.raises(ValueError, match="collate function of the test loader, sorting, puts the examples"):
        toy.influence(data)


def mean_of_classes(module, ids, labels):
    return functional.cross_entropy(module(ids), labels, weight=torch.tensor([1.0, 1.0, 20.0]))


def mean_of_labelled(module, ids, labels):
    return functional.cross_entropy(module(ids), labels, ignore_index=2)


def mean_of_words(module, ids, labels):
    words = (ids != 0).sum(1)
    return (functional.cross_entropy(module(ids), labels, reduction="none") * words).sum() / words.sum()


class Weighing(Still):
    """Trains with a mean of another kind than that of the examples' losses."""

    def __init__(self):
        super().__init__()
        self.mean = mean_of_classes

    def training_step(self, batch, batch_idx):
        return self.mean(self, *batch)


class PlainWeighing(Weighing):
    influence_loss = None


MEANS = {
    "by class": (mean_of_classes, lambda: Rare()),
    "over labelled": (mean_of_labelled, lambda: Rare()),
    "over words": (mean_of_words, lambda: Rare(length=2, label=1)),
    "by class, sorted": (mean_of_classes, lambda: Rare(every=10**6, at=199)),
}


@pytest.mark.parametrize("kind", [Weighing, PlainWeighing])
@pytest.mark.parametrize("mean", MEANS)
def test_a_loss_that_weighs_what_is_rare_is_refused(tmp_path, kind, mean):
    module = build(kind)
    module.mean, data = MEANS[mean]
    message = "does not return the mean of influence_loss|is not a mean of independent"
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, module, loader(data(), batch_size=8, collate_fn=padded), cache="training")


def test_a_mean_of_the_examples_is_not(tmp_path):
    module = build(Weighing)
    module.mean = lambda module, ids, labels: functional.cross_entropy(module(ids), labels)
    data = loader(Rare(length=2), batch_size=8, collate_fn=padded)
    fitted(tmp_path, module, data, cache="training", trainer={"max_epochs": 1})


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 50])
def test_the_first_batch_has_the_first_and_the_last_example(n, batch_size):
    data = Rare(n)
    training_set = TrainingSet(loader(data, batch_size=batch_size))
    indices = training_set.first_indices
    assert len(set(indices)) == len(indices) == min(8, n, batch_size)
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert batch_size == 1 or indices[-1] == n - 1
    assert torch.equal(training_set.first_batch()[0], data.ids[indices])


def test_what_is_rare_is_chosen_and_the_others_lie_apart():
    looked = {index: (7, float(index in (30, 500))) for index in range(0, 1001, 10)}
    chosen = differing(looked, 8)
    assert len(set(chosen) & {30, 500}) >= 1
    assert max(later - earlier for earlier, later in itertools.pairwise(chosen)) <= 300
    for n in range(1, 8):
        assert set(differing(looked, n)) <= set(chosen)
    assert differing({5: UNSEEN}, 8) == [5]
    assert differing({}, 8) == []


LABELS = {
    "a pair": ((torch.ones(3), 2), 2.0),
    "a list": ([torch.ones(3), torch.tensor(2)], 2.0),
    "a mapping": ({"ids": torch.ones(3), "labels": 2}, 2.0),
    "label": ({"ids": torch.ones(3), "label": np.int64(2)}, 2.0),
    "a pair of mappings": (({"ids": torch.ones(3)}, {"labels": torch.tensor(2.0)}), 2.0),
    "an array": ((torch.ones(3), np.array(2)), 2.0),
    "a truth": ((torch.ones(3), True), 1.0),
    "tags": ((torch.ones(1), torch.ones(3)), None),
    "a name": ((torch.ones(3), "3"), None),
    "three": ((torch.ones(2), 1, 2), None),
    "none": ((torch.ones(3), None), None),
    "a complex number": ((torch.ones(3), 1j), None),
    "too large": ((torch.ones(3), 10**400), None),
    "text": ("abcd", None),
}


@pytest.mark.parametrize(("item", "label"), LABELS.values(), ids=LABELS)
def test_what_is_noticed_of_an_example(item, label):
    assert look_of(item) == (4, label)


def test_a_training_set_is_read_no_more_often_than_for_its_fingerprint():
    data = Rare()
    training_set = TrainingSet(loader(data, collate_fn=padded))
    training_set.fingerprint()
    assert len(data.read) == 2 * 67
    assert any(data.is_rare(index) for index in training_set.first_indices)
    assert training_set.looked[199] == UNSEEN
    assert len(data.read) == 2 * 67
    check_order(training_set.loader, "training", training_set.looked)
    assert len(data.read) == 2 * 67 + 8 + 8 - 1 + (data.read[-1] == 0)


def test_workers_read_if_there_are_any():
    data = Rare()
    training_set = TrainingSet(loader(data, collate_fn=padded, num_workers=1))
    check_order(training_set.loader, "training", training_set.looked)
    assert training_set.lengths(range(200)) is None
    assert training_set.looked == TrainingSet(loader(Rare(), collate_fn=padded)).looked
    assert training_set.fingerprint() == TrainingSet(loader(Rare(), collate_fn=padded)).fingerprint()
    assert len(training_set.first_batch()[0]) == 4
    check_order(training_set.loader, "test")
    assert data.read == []


def test_a_part_is_read_where_that_is_drawn_from():
    data = Rare()
    part = SubsetRandomSampler(range(100, 200))
    check_order(loader(data, collate_fn=padded, sampler=part), "test")
    assert set(data.read) <= set(range(100, 200))
    assert len(data.read) == 64 + 16


def test_the_choice_draws_no_random_number():
    class Drawing(Rare):
        def __getitem__(self, index):
            ids, label = super().__getitem__(index)
            return ids[: random.randint(1, 7)], label

    states = random.getstate(), torch.get_rng_state().tolist()
    data = loader(Drawing(), collate_fn=padded)
    check_order(data, "test")
    assert len(TrainingSet(data).first_indices) == 4
    assert states == (random.getstate(), torch.get_rng_state().tolist())
