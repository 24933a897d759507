"""What must not change a score, beside what the properties of `test_properties.py` draw at random."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from toy import N_TEST, N_TRAIN, STEPS_PER_EPOCH, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import TracInWE
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.storage import files, shards

METHODS = ["tracin-we", "tracin-last"]


class Streamed(IterableDataset):
    """The same examples without an index."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter(self.data)


@dataclass
class Text:
    """An example of a class of the user's own."""

    tokens: list[int]


class ByLength(BatchSampler):
    """Batches of examples of like length, as bucketing samplers make them."""

    def __init__(self, data, batch_size):
        self.order = sorted(range(len(data)), key=lambda index: int((data[index][0] != 0).sum()))
        self.batch_size = batch_size

    def __iter__(self):
        return (self.order[start : start + self.batch_size] for start in range(0, len(self.order), self.batch_size))

    def __len__(self):
        return -(-len(self.order) // self.batch_size)


@pytest.fixture(scope="module")
def uncached(tmp_path_factory):
    """A trace with checkpoints only, and the module that was fitted."""
    path = tmp_path_factory.mktemp("uncached") / "trace"
    return path, fitted(path, cache="on_demand").lightning_module


@pytest.fixture(scope="module")
def expected(toy):
    return {method: toy.influence(loader(test_texts()), method=method).scores for method in METHODS}


def assert_same(scores, expected):
    assert scores.shape == (N_TEST, N_TRAIN)
    assert (scores - expected).norm() <= 1e-5 * expected.norm()


TRAINING_LOADERS = {
    "last batch dropped": lambda: loader(batch_size=6, shuffle=True, drop_last=True),
    "weighted sampler": lambda: loader(sampler=WeightedRandomSampler([1.0, 5.0] * (N_TRAIN // 2), 7)),
    "workers": lambda: loader(shuffle=True, num_workers=2),
    "own batch sampler": lambda: DataLoader(texts(), batch_sampler=ByLength(texts(), 3)),
    "batch sampler as sampler": lambda: DataLoader(
        texts(), batch_size=None, sampler=BatchSampler(RandomSampler(texts()), 3, drop_last=True)
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", TRAINING_LOADERS.values(), ids=TRAINING_LOADERS)
def test_how_the_training_loader_draws_does_not_matter(uncached, expected, tmp_path, make, method):
    path = shutil.copytree(uncached[0], tmp_path / "trace")
    result = quiet().influence(loader(test_texts()), uncached[1], train_dataloaders=make(), trace=path, method=method)
    assert_same(result.scores, expected[method])


TEST_LOADERS = {
    "last batch dropped": lambda: loader(test_texts(), drop_last=True),
    "some twice": lambda: loader(test_texts(), sampler=[3, 1, 0, 3, 2, 5, 4, 0]),
    "workers": lambda: loader(test_texts(), num_workers=2),
    "own batch sampler": lambda: DataLoader(test_texts(), batch_sampler=ByLength(test_texts(), 4)),
    "a stream": lambda: loader(Streamed(test_texts())),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", TEST_LOADERS.values(), ids=TEST_LOADERS)
def test_how_the_test_loader_draws_does_not_matter(toy, expected, make, method):
    result = toy.influence(make(), method=method)
    assert result.test_indices.tolist() == list(range(N_TEST))
    assert_same(result.scores, expected[method])


def test_rows_are_those_of_the_sampled_test_examples_in_the_order_of_the_data_set(toy, expected):
    result = toy.influence(loader(test_texts(), sampler=[5, 2]))
    assert result.test_indices.tolist() == [2, 5]
    torch.testing.assert_close(result.scores, expected["tracin-we"][[2, 5]], rtol=1e-4, atol=1e-9)


def test_a_subset_is_numbered_by_its_own_positions(toy, expected):
    result = toy.influence(loader(Subset(test_texts(), [4, 1])))
    assert result.test_indices.tolist() == [0, 1]
    torch.testing.assert_close(result.scores, expected["tracin-we"][[4, 1]], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_padding_to_another_length_does_not_matter(uncached, expected, tmp_path, method):
    def padded(data):
        ids, labels = data.tensors
        return torch.utils.data.TensorDataset(torch.nn.functional.pad(ids, (0, 9)), labels)

    path = tmp_path / "trace"
    fit = fitted(path, data=loader(padded(texts()), shuffle=True))
    scores = fit.influence(loader(padded(test_texts())), method=method).scores
    # Sums over more positions are rounded otherwise, in training too.
    assert (scores - expected[method]).norm() <= 1e-4 * expected[method].norm()


class OfLengths(Toy):
    """Sees how long the batches are that its gradients are taken of, and spoils one example's loss late in training."""

    widths: ClassVar[list[int]] = []  # what an instance has is put back after each pass

    def __init__(self, spoiled: int = -1) -> None:
        super().__init__()
        self.spoiled = texts()[spoiled][0] if spoiled >= 0 else None
        self.widths.clear()

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        if not self.training and self.trainer.global_step > 0:  # not in the checks before training
            self.widths.append(batch[0].shape[1])
        if self.spoiled is not None and self.trainer.global_step > STEPS_PER_EPOCH:
            width = batch[0].shape[1]
            same = (batch[0] == self.spoiled[:width]).all(1) & (self.spoiled[width:] == 0).all()
            losses = torch.where(same, torch.nan, losses) if not self.training else losses
        return losses


class Ragged(Dataset):
    """The same texts without padding, as tokenizers give them; remembers which were read."""

    def __init__(self) -> None:
        self.padded = texts()
        self.read: list[int] = []

    def __len__(self):
        return len(self.padded)

    def __getitem__(self, index):
        self.read.append(index)
        ids, label = self.padded[index]
        return {"input_ids": ids[ids != 0].tolist(), "label": label}


def to_the_longest(items):
    if isinstance(items[0], dict):
        items = [
            (torch.nn.functional.pad(torch.tensor(ids), (0, 7 - len(ids))), y) for ids, y in map(dict.values, items)
        ]
    ids, labels = torch.utils.data.default_collate(items)
    return ids[:, : int((ids != 0).sum(1).max())], labels


@pytest.mark.parametrize(
    ("shard_examples", "cache"),
    [
        (8, "checkpoint"),
        (100, "on_demand"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, "on_demand"), (100, "checkpoint"))),
    ],
)
@pytest.mark.parametrize(
    ("build", "methods"),
    [(texts, METHODS), (Ragged, METHODS), (Ragged, ("tracin-last",))],
    ids=["padded", "ragged", "ragged, without words"],
)
def test_texts_of_about_one_length_come_together_once_lengths_are_known(
    tmp_path, monkeypatch, cache, shard_examples, build, methods
):
    """From the first checkpoint on where the data set tells them, else from the second; the scores stay the same."""
    monkeypatch.setattr(shards, "MOST_SHARD_EXAMPLES", shard_examples)
    module = OfLengths()
    options = {"cache": cache, "methods": methods}
    fit = fitted(tmp_path / "trace", module, loader(build(), collate_fn=to_the_longest), **options)
    if cache == "on_demand":
        module.widths.clear()
        fit.influence(
            loader(test_texts()),
            train_dataloaders=loader(build(), collate_fn=to_the_longest),
            method=methods[0],
        )
    lengths = (texts().tensors[0] != 0).sum(1)
    grouped = torch.cat([part.sort(descending=True).values for part in lengths.split(shard_examples)])
    in_order, by_length = ([int(part.max()) for part in each.split(4)] for each in (lengths, grouped))
    assert sum(by_length) < sum(in_order)
    first = by_length if build is Ragged else in_order
    assert module.widths[: 2 * len(first)] == first + by_length
    alone = loader(build(), batch_size=1, collate_fn=to_the_longest)
    (tmp_path / "alone").mkdir()
    path = shutil.copytree(tmp_path / "trace", tmp_path / "alone" / "trace")
    for folder in (*path.glob("checkpoints/*/*/"), path / "texts"):
        shutil.rmtree(folder)
    expected, found = (
        quiet().influence(loader(test_texts()), Toy(), train_dataloaders=alone, trace=each, method=methods[0]).scores
        for each in (path, tmp_path / "trace")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lengths_are_read_once_and_draw_no_random_number(num_workers):
    data = Ragged()
    training_set = TrainingSet(loader(data, num_workers=num_workers, collate_fn=to_the_longest))
    state = torch.get_rng_state()
    lengths = training_set.lengths(range(3, N_TRAIN))
    assert torch.equal(torch.get_rng_state(), state)
    expected = (texts().tensors[0][3:] != 0).sum(1)
    assert torch.equal(lengths - lengths[0], expected - expected[0])
    data.read.clear()
    assert training_set.lengths(range(3, N_TRAIN)) is lengths
    assert not data.read


def test_a_data_set_of_one_length_is_not_read_to_its_end():
    data = Ragged()
    data.padded = TensorDataset(torch.ones(N_TRAIN, 7, dtype=torch.long), torch.zeros(N_TRAIN))
    training_set = TrainingSet(loader(data))
    assert training_set.looked
    data.read.clear()
    assert training_set.lengths(range(N_TRAIN)) is None
    assert data.read == []


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("goal", "a goal"),
        (["a"], ["a", "b"]),
        (torch.zeros(2), torch.zeros(3)),
        (np.zeros(2), np.zeros(3)),
        ({"input_ids": [1, 2], "label": 0}, {"input_ids": [1, 2, 3], "label": 0}),
        (("goal", None), ("a goal", None)),
        (Text([1]), Text([1, 2])),
    ],
)
def test_lengths_of_examples_of_any_make(short, long):
    lengths = TrainingSet(DataLoader([long, short, long])).lengths(range(3))
    assert lengths[0] == lengths[2] > lengths[1]


def test_streams_and_data_sets_that_hand_out_batches_do_not_tell_lengths():
    assert TrainingSet(loader(Streamed(Ragged()))).lengths(range(N_TRAIN)) is None
    sampler = BatchSampler(range(N_TRAIN), 4, drop_last=False)
    assert TrainingSet(DataLoader(Ragged(), batch_size=None, sampler=sampler)).lengths(range(N_TRAIN)) is None


def test_an_example_whose_gradient_is_not_finite_is_named_by_its_index_in_whatever_order_it_came(tmp_path):
    lengths = (texts().tensors[0] != 0).sum(1)
    spoiled = int(lengths[10:].argmin()) + 10
    place = int((lengths > lengths[spoiled]).sum() + (lengths[:spoiled] == lengths[spoiled]).sum())
    assert place != spoiled
    with pytest.raises(ValueError, match=f"training example {spoiled} is NaN"):
        fitted(tmp_path, OfLengths(spoiled), loader(collate_fn=to_the_longest))


def test_an_iterable_data_set_is_numbered_by_its_order(expected, tmp_path):
    fit = fitted(tmp_path / "map", data=loader())
    streamed = fitted(tmp_path / "stream", data=loader(Streamed(texts())))
    scores = [each.influence(loader(test_texts())).scores for each in (fit, streamed)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_as_training_set_scores_like_the_data_set(uncached, expected, tmp_path, workers):
    """Several workers would each yield the whole stream."""
    path = shutil.copytree(uncached[0], tmp_path / "trace")
    header = files.read_json(path / "trace.json")
    stream = loader(Streamed(texts()), num_workers=workers)
    fingerprint = TrainingSet(stream).fingerprint()  # of its length: a stream's examples cannot be looked up
    files.write_json(path / "trace.json", {**header, "data_fingerprint": fingerprint})
    scores = quiet().influence(loader(test_texts()), uncached[1], train_dataloaders=stream, trace=path).scores
    assert_same(scores, expected["tracin-we"])


def test_limits_of_the_trainer_do_not_cut_the_training_set(uncached, expected, tmp_path):
    path = shutil.copytree(uncached[0], tmp_path / "trace")
    trainer = quiet(limit_predict_batches=1, limit_train_batches=1)
    scores = trainer.influence(loader(test_texts()), uncached[1], train_dataloaders=loader(), trace=path).scores
    torch.testing.assert_close(scores, expected["tracin-we"][:4], rtol=1e-4, atol=1e-9)


def test_asking_twice_gives_the_same(toy):
    first, second = (toy.influence(loader(test_texts(), shuffle=True)).scores for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-9)


def test_shards_are_as_many_as_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_SHARD_EXAMPLES", 7)
    trace = fitted(tmp_path / "trace").callbacks[0].trace
    assert {len(list(each.path.glob("words/*.safetensors"))) for each in trace.checkpoints} == {3}


def test_storing_the_top_words_scores_like_choosing_them(toy, tmp_path):
    fit = fitted(tmp_path / "trace", top_words=2)
    chosen = toy.influence(loader(test_texts()), method=TracInWE(top_words=2)).scores
    torch.testing.assert_close(fit.influence(loader(test_texts())).scores, chosen)
    assert not torch.allclose(chosen, toy.influence(loader(test_texts())).scores)
    for options, said in (
        ({"exclude_tokens": [1, 2]}, "leaves words out"),
        ({"precondition": "adam"}, "preconditions"),
    ):
        method = TracInWE(top_words=2, **options)  # which chooses after it has done that
        few, all_words = (each.influence(loader(test_texts()), method=method) for each in (fit, toy))
        assert not torch.allclose(few.scores, all_words.scores)
        assert sum("keeps the 2 words" in note and said in note for note in few.notes) == 1
        assert not any("keeps the 2 words" in note for note in (*all_words.notes, *fit.influence(loader()).notes))


def test_the_module_may_be_anywhere_in_training_when_it_is_asked(toy, expected):
    module = Toy()  # other weights: those of the checkpoints are loaded, and these given back
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.hidden.eval()
    scores = quiet().influence(loader(test_texts()), module, trace=toy.callbacks[0].trace).scores
    assert_same(scores, expected["tracin-we"])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.training
    assert not module.hidden.training
