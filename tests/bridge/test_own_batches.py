"""Batch samplers of the user's own: passes read what they compose, and never hold more than training did."""

from __future__ import annotations

import random
import threading

import pytest
import pytorch_lightning as pl
import torch
from brute_force import relative_error
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, default_collate
from toy import Toy, quiet, same_weights, texts
from unpadded import BUDGET, EqualLengths, Still, Texts, TokenBudget, brute_scores, padded

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.bridge.own_batches import batches_of_all, batches_once
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.querying import influence
from lightning_tracin.storage import runs, shards

LOADERS = {
    "equal lengths": lambda data: DataLoader(data, batch_sampler=EqualLengths(data)),
    "of workers": lambda data: DataLoader(data, batch_sampler=EqualLengths(data), num_workers=2),
    "some left out": lambda data: DataLoader(data, batch_sampler=EqualLengths(data, drop=2)),
    "a token budget": lambda data: DataLoader(data, batch_sampler=TokenBudget(data), collate_fn=padded),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_scores_are_those_of_the_definition(tmp_path, monkeypatch, make, cache):
    monkeypatch.setattr(shards, "MOST_SHARD_EXAMPLES", 7)  # what is together in a batch is in several shards
    monkeypatch.setattr(runs, "_RUN_BYTES", 2_000)
    pl.seed_everything(0, verbose=False)
    train, test, module = Texts(), Texts(10, seed=1), Still()
    callback = TracInCallback(tmp_path / "trace", dtype="float32", cache=cache, on_error="raise")
    trainer = quiet(callbacks=[callback], max_epochs=1)
    loader = make(train)
    trainer.fit(module, loader)
    scores = trainer.influence(make(test)).scores
    tested = sorted({index for batch in make(test).batch_sampler for index in batch})
    expected = brute_scores([each.weights() for each in callback.trace.checkpoints], train, test)[tested]
    read = torch.ones(len(train), dtype=torch.bool)
    if hasattr(loader.batch_sampler, "drawn"):  # what it leaves out counts zero
        read[sorted(set(range(len(train))) - loader.batch_sampler.drawn)] = False
    assert relative_error(scores, expected * read) < 1e-5
    stored = [callback.trace.texts([index]).ids.tolist() for index in range(len(train))]
    assert stored == [ids.tolist() if was_read else [] for ids, was_read in zip(train.ids, read, strict=True)]
    assert not list(callback.trace.path.rglob("*.partial"))


def test_no_pass_holds_more_than_the_largest_batch_of_training(tmp_path):
    train, module = Texts(), Still()
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", on_error="raise")])
    trainer.fit(module, LOADERS["a token budget"](train))
    trainer.influence(LOADERS["a token budget"](Texts(20, seed=1)))
    assert max(module.held) <= BUDGET
    assert len(module.held) > 20


def test_blocks_of_a_query_keep_batches_together(tmp_path, monkeypatch):
    monkeypatch.setattr(influence, "_BLOCK_BYTES", 2_000)
    train, test, module = Texts(), Texts(20, seed=1), Still()
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", dtype="float32", on_error="raise")])
    trainer.fit(module, LOADERS["equal lengths"](train))
    result = trainer.influence(LOADERS["equal lengths"](test))
    assert result.test_indices.sort().values.tolist() == list(range(20))
    expected = brute_scores([each.weights() for each in result.trace.checkpoints], train, test)
    assert relative_error(result.scores, expected[result.test_indices]) < 1e-5


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_training_draws_the_same_batches_as_without_the_callback(tmp_path, cache):
    outcomes = []
    for callbacks in ([], [TracInCallback(tmp_path / "trace", cache=cache, every_n_train_steps=3)]):
        pl.seed_everything(0, verbose=False)
        module, data = Toy(), Texts()
        sampler = EqualLengths(data)
        trainer = quiet(callbacks=callbacks)
        trainer.fit(module, DataLoader(data, batch_sampler=sampler))
        outcomes.append((module.state_dict(), sampler.epoch, sampler.buckets, sampler.random.getstate()))
    assert same_weights(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1:] == outcomes[1][1:]


class HandsOut(Texts):
    """Gives whole batches for lists of indices, as data sets of Hugging Face do."""

    def __getitem__(self, index):
        return (
            default_collate([Texts.__getitem__(self, i) for i in index]) if isinstance(index, list) else self[[index]]
        )


def test_a_data_set_that_hands_out_batches_is_asked_for_those_of_the_sampler(tmp_path):
    train, test = HandsOut(), Texts(10, seed=1)
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", dtype="float32", on_error="raise")], max_epochs=1)
    trainer.fit(
        Still(), DataLoader(train, batch_size=None, sampler=EqualLengths(train), collate_fn=lambda batch: batch)
    )
    result = trainer.influence(LOADERS["equal lengths"](test))
    expected = brute_scores([each.weights() for each in result.trace.checkpoints], Texts(), test)
    assert relative_error(result.scores, expected) < 1e-5


def test_a_sampler_without_an_end_is_not_waited_for():
    data = Texts()
    loader = DataLoader(data, batch_sampler=EqualLengths(data, drop=1, ends=False))
    batches = batches_of_all(loader)
    assert sorted(index for batch in batches for index in batch) == list(range(30))
    assert all(len({len(data.ids[index]) for index in batch}) == 1 for batch in batches)
    assert len(batches_once(loader, 3)) == 3


def test_generators_of_the_sampler_are_left_where_they_are():
    class Pairs(BatchSampler):
        """Two texts that follow each other."""

    data, generator = Texts(), torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_sampler=Pairs(RandomSampler(data, generator=generator), 2, drop_last=False))
    before = generator.get_state(), torch.get_rng_state(), random.getstate()
    assert batches_once(loader) == batches_of_all(loader) == batches_once(loader, 20)
    assert torch.equal(before[0], generator.get_state())
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == random.getstate()
    assert batches_once(loader, 3) == [batch for batch, _ in zip(loader.batch_sampler, range(3), strict=False)]


def test_a_sampler_that_cannot_be_copied_is_read_all_the_same():
    class Locked(TokenBudget):
        def __init__(self, data) -> None:
            super().__init__(data)
            self.lock = threading.Lock()

    data = Texts()
    assert batches_once(DataLoader(data, batch_sampler=Locked(data))) == list(TokenBudget(data))


def test_what_a_sampler_cannot_draw_is_read_by_itself():
    data = Texts()
    batches = batches_of_all(DataLoader(data, batch_sampler=[[3, 6], [6, 9, -1]]))
    assert batches[:2] == [[3, 6], [9, 29]]
    assert batches[2:] == [[index] for index in range(29) if index not in (3, 6, 9)]


def test_torchs_own_batch_sampler_may_be_left_aside():
    assert batches_of_all(DataLoader(texts(), batch_size=4, shuffle=True)) is None
    assert TrainingSet(DataLoader(texts(), batch_size=4)).batches is None


def test_the_first_batch_is_one_that_the_sampler_composes():
    data = Texts()
    training_set = TrainingSet(DataLoader(data, batch_sampler=EqualLengths(data), collate_fn=default_collate))
    ids, _ = training_set.first_batch()
    assert ids.shape == (4, len(data.ids[training_set.first_indices[0]]))


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks):
    """The folder, and what each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = forks.run_two(folder, script="own_batch_processes.py")
    assert done.returncode == 0, done.stderr
    return folder, *(torch.load(folder / f"process-{rank}.pt", weights_only=True) for rank in (0, 1))


@pytest.mark.parametrize("name", ["checkpoint", "training", "on_demand", "fsdp"])
def test_two_processes_read_the_batches_of_all_their_samplers(two, name):
    folder, *found = two
    weights = [each.weights() for each in Trace(folder / name).checkpoints]
    expected = brute_scores(weights, Texts(), Texts(10, seed=1))
    for each in found:
        assert relative_error(each[name], expected) < 1e-5
        assert each[f"{name} held"] <= BUDGET
    assert not list((folder / name).rglob("*.partial"))
