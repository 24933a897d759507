"""The training loader is not the fit's alone: validations, callbacks, people and passes read it, too."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle

import pytest
import pytorch_lightning as pl
import torch
from brute_force import dense_gradients, relative_error
from torch.utils.data import BatchSampler, DataLoader
from toy import EPOCHS, N_TRAIN, Toy, fitted, loader, quiet, same_weights, test_texts, texts

from lightning_tracin import TracInCallback

RATE = 1e-6


class Still(Toy):
    """Hardly moves, so that the gradients of all its steps are those of its first weights."""

    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", self.influence_loss(batch).mean())


class Looking(pl.Callback):
    """Reads a batch or all of the training loader, before an epoch and in its midst."""

    def on_train_epoch_start(self, trainer, pl_module):
        next(iter(trainer.train_dataloader))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            list(trainer.train_dataloader)


def by_validation(callback, workers):
    train = loader(shuffle=True, num_workers=workers)  # workers that are kept have one iteration for all
    trainer = quiet(callbacks=[callback], max_epochs=2, val_check_interval=0.4)
    trainer.fit(Still(), train, [loader(test_texts()), train])
    return trainer


def by_callbacks(callback, workers):
    train = loader(shuffle=True, num_workers=workers)
    trainer = quiet(callbacks=[Looking(), callback], max_epochs=2)
    trainer.fit(Still(), train)
    return trainer


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("read", [by_validation, by_callbacks])
@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_examples_keep_their_numbers(tmp_path, cache, read, workers):
    pl.seed_everything(0, verbose=False)
    methods = ("tracin-we", "tracin-last")
    callback = TracInCallback(tmp_path, dtype="float32", on_error="raise", cache=cache, methods=methods)
    trainer = read(callback, workers)
    module = trainer.lightning_module.eval()
    for method, layer in (("tracin-we", module.embedding), ("tracin-last", module.head)):
        result = trainer.influence(loader(test_texts()), method=method)
        test, train = (
            dense_gradients(
                module.double(), layer, loader(side, batch_size=1), lambda one: module.influence_loss(one).sum()
            )
            for side in (test_texts(), texts())
        )
        module.float()
        expected = 2 * RATE * test.flatten(1) @ train.flatten(1).T
        assert relative_error(result.scores, expected) < 1e-3  # of the weights that do move
        assert len(result.undrawn) == 0


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_workers_that_are_kept_from_a_look_before_the_fit(tmp_path, cache):
    train = loader(shuffle=True, num_workers=1, persistent_workers=True)
    next(iter(train))
    own = train.batch_sampler
    trace = fitted(tmp_path, data=train, cache=cache, on_error="raise").callbacks[0].trace
    assert [each.step for each in trace.checkpoints] == [5, 10]
    assert train.batch_sampler is own
    assert sum(len(batch[1]) for batch in train) == 20
    del train
    gc.collect()  # of the trainer, which has the loader, and with it the worker
    assert multiprocessing.active_children() == []


class Cutting(DataLoader):
    """Changes batches where no pass sees it."""

    def __iter__(self):
        for ids, labels in super().__iter__():
            yield ids[:, :3], labels


@pytest.mark.parametrize(("kind", "n_warnings"), [(Cutting, 1), (type("Renamed", (DataLoader,), {}), 0)])
def test_a_loader_that_iterates_in_a_way_of_its_own_is_warned_of(tmp_path, recwarn, kind, n_warnings):
    fitted(tmp_path, data=kind(texts(), batch_size=4))
    told = [each for each in recwarn if "Cutting iterates in a way of its own" in str(each.message)]
    assert len(told) == n_warnings


class Pairs(BatchSampler):
    """A batch sampler of one's own."""

    def __init__(self, sampler, batch_size=2, drop_last=False):
        super().__init__(sampler, batch_size, drop_last)


class Numbered(Still):
    def predict_step(self, batch, batch_idx):
        return batch[1]


def predicted(train):
    return quiet().predict(Numbered(), train)


def made_anew(train):
    """As Lightning makes one, where a process gets a share."""
    return list(type(train.batch_sampler)(range(9), batch_size=2, drop_last=True))


ACTS = {
    "predicted": predicted,
    "made anew": made_anew,
    "copied": lambda train: list(copy.copy(train.batch_sampler)),
    "copied with the loader": lambda train: [labels for _, labels in copy.deepcopy(train)],
    "pickled": lambda train: list(pickle.loads(pickle.dumps(train.batch_sampler))),
    "pickled with the loader": lambda train: [labels for _, labels in pickle.loads(pickle.dumps(train))],
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_callback_hands_on_or_copies_the_loader(tmp_path, act, own):
    """It has what it would have without ours, of which nothing is in a copy."""

    def run(*callbacks):
        found = []

        class Acts(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 2:
                    train = trainer.train_dataloader
                    copied = (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)))
                    assert {type(each(train.batch_sampler)) for each in copied} == {Pairs if own else BatchSampler}
                    found.append(act(train))

        pl.seed_everything(0, verbose=False)
        train = loader(shuffle=True)
        train = DataLoader(texts(), batch_sampler=Pairs(train.sampler, 4)) if own else train
        trainer = quiet(callbacks=[*callbacks, Acts()])
        trainer.fit(Still(), train)
        return found, trainer.lightning_module.state_dict()

    ours = [TracInCallback(tmp_path / cache, cache=cache, on_error="raise") for cache in ("checkpoint", "training")]
    (found,), weights = run(*ours)
    (expected,), others = run()
    assert str(found) == str(expected)
    assert same_weights(weights, others)
    for callback in ours:
        assert len(callback.trace.checkpoints) == EPOCHS
        assert all(len(each.steps) == N_TRAIN / 4 for each in callback.trace.checkpoints)
        assert all(each.drawn() is None for each in callback.trace.checkpoints)  # each epoch has all
