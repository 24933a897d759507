"""Batch samplers of the user's own: passes read what they compose, and never hold more than training did."""

from __future__ import annotations

import random

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate
from toy import CLASSES, VOCABULARY, Toy, quiet, same_weights, texts

from lightning_tracin import TracInCallback
from lightning_tracin.bridge.own_batches import batches_of_all, batches_once
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.querying import influence
from lightning_tracin.storage import runs, shards

RATE, BUDGET = 1e-9, 24


class Texts(Dataset):
    """Texts without padding, of four lengths; one of length 9 stands alone."""

    def __init__(self, n: int = 30, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = [9, *(2 + index % 3 for index in range(1, n))]
        self.ids = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
        self.labels = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index], self.labels[index]


class EqualLengths(BatchSampler):
    """Batches of at most four texts of one length: it shuffles its own list in place, and counts epochs."""

    def __init__(self, data: Texts, *, drop: int = 0, ends: bool = True) -> None:
        self.data = data
        self.random = random.Random(0)
        self.drop, self.ends, self.epoch = drop, ends, 0
        self.buckets = [[i for i, ids in enumerate(data.ids) if len(ids) == size] for size in {*map(len, data.ids)}]

    def __iter__(self):
        while True:
            self.epoch += 1
            batches = []
            for bucket in self.buckets:
                self.random.shuffle(bucket)
                batches += [bucket[start : start + 4] for start in range(0, len(bucket), 4)]
            self.random.shuffle(batches)
            self.drawn = {index for batch in batches[self.drop :] for index in batch}
            yield from batches[self.drop :]
            if self.ends:
                return

    def __len__(self) -> int:
        return sum(-(-len(bucket) // 4) for bucket in self.buckets) - self.drop


class TokenBudget:
    """Batches that hold at most so many tokens with their padding; no subclass of torch's."""

    def __init__(self, data: Texts) -> None:
        self.data = data

    def __iter__(self):
        batch: list[int] = []
        for index in sorted(range(len(self.data)), key=lambda index: len(self.data.ids[index])):
            if len(self.data.ids[index]) * (len(batch) + 1) > BUDGET:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


def padded(items):
    return pad_sequence([ids for ids, _ in items], batch_first=True), torch.stack([label for _, label in items])


class Still(Toy):
    """Barely moves, so that gradients of the moment are those at the checkpoint; sees how much a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout.p = 0.0
        self.held: list[int] = []

    def influence_loss(self, batch):
        self.held.append(batch[0].numel())
        return super().influence_loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


LOADERS = {
    "equal lengths": lambda data: DataLoader(data, batch_sampler=EqualLengths(data)),
    "of workers": lambda data: DataLoader(data, batch_sampler=EqualLengths(data), num_workers=2),
    "some left out": lambda data: DataLoader(data, batch_sampler=EqualLengths(data, drop=2)),
    "a token budget": lambda data: DataLoader(data, batch_sampler=TokenBudget(data), collate_fn=padded),
}


def brute_scores(weights, train, test):
    """By the definition, at each checkpoint's weights."""
    sides = []
    for data in (test, train):
        of_side = []
        for state in weights:
            module = Still()
            module.load_state_dict(state)
            singles = DataLoader(data, batch_size=1)
            losses = module.influence_loss
            of_side.append(dense_gradients(module, module.embedding, singles, lambda b, f=losses: f(b).sum()))
        sides.append(of_side)
    return BruteForce([RATE] * len(weights), *sides).scores()


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_scores_are_those_of_the_definition(tmp_path, monkeypatch, make, cache):
    monkeypatch.setattr(shards, "_SHARD_EXAMPLES", 7)  # what is together in a batch is in several shards
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
    if cache == "training" and hasattr(loader.batch_sampler, "drawn"):  # what it leaves out counts zero
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


def test_a_sampler_without_an_end_is_not_waited_for():
    data = Texts()
    loader = DataLoader(data, batch_sampler=EqualLengths(data, drop=1, ends=False))
    batches = batches_of_all(loader)
    assert sorted(index for batch in batches for index in batch) == list(range(30))
    assert all(len({len(data.ids[index]) for index in batch}) == 1 for batch in batches)
    assert len(batches_once(loader, 3)) == 3


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
