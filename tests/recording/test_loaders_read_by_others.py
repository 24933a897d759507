"""The training loader is not the fit's alone: validations, callbacks, people and passes read it, too."""

from __future__ import annotations

import gc
import multiprocessing

import pytest
import pytorch_lightning as pl
import torch
from brute_force import dense_gradients, relative_error
from torch.utils.data import DataLoader
from toy import Toy, fitted, loader, quiet, test_texts, texts

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
