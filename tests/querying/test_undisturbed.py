"""A query leaves the process as it was, and a fit that is running alone."""

from __future__ import annotations

import random

import lightning.pytorch as twin
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import Dataset, RandomSampler
from toy import N_TEST, Toy, fitted, loader, quiet, same_weights, test_texts, texts
from twin_toy import TwinToy
from untouched import DATA, GENERATORS, HOLDERS, Remembering

from lightning_tracin import TracInCallback, influence, self_influence


class Drawing(Dataset):
    """Draws from each generator that people use, and gives what it would give without."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(())
        return self.data[index]


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def drawing(data):
    return loader(Drawing(data), sampler=RandomSampler(Drawing(data)))


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_no_random_number_is_taken(tmp_path, cache):
    fit = fitted(tmp_path / "trace", Toy(), loader(Drawing(texts()), shuffle=True), cache=cache)
    before = states()
    fit.self_influence()
    assert states() == before
    fit.influence(drawing(test_texts()), method="tracin-last")
    assert states() == before
    fit.influence(loader(test_texts()), train_dataloaders=drawing(texts()))
    assert states() == before


def test_no_random_number_is_taken_by_a_query_that_fails(toy):
    class Broken(Drawing):
        def __getitem__(self, index):
            if index == N_TEST - 1:
                raise OSError("gone")
            return super().__getitem__(index)

    before = states()
    with pytest.raises(OSError, match="gone"):
        toy.influence(loader(Broken(test_texts()), batch_size=1))
    assert states() == before


def logging(base):
    class Logging(base):
        """Logs as modules do."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.influence_loss(batch).mean())

    return Logging


def metrics(trainer):
    return [dict(each) for each in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)]


@pytest.mark.parametrize(("kind", "base"), [(pl.Trainer, Toy), (twin.Trainer, TwinToy)], ids=["pl", "twin"])
def test_what_the_trainer_has_logged_stays(tmp_path, kind, base):
    trainer = quiet(kind, callbacks=[TracInCallback(tmp_path / "trace", cache="on_demand", on_error="raise")])
    trainer.fit(logging(base)(), loader(), loader(test_texts()))
    before = metrics(trainer)
    assert "val_loss" in before[0]
    assert "loss_step" in before[1]
    assert "loss_step" in before[2]
    self_influence(trainer)
    assert metrics(trainer) == before
    influence(trainer, loader(test_texts()))
    assert metrics(trainer) == before
    with pytest.raises(ValueError, match="collate function drops"):
        influence(trainer, loader(test_texts(), collate_fn=lambda r: torch.utils.data.default_collate(r[1:])))
    assert metrics(trainer) == before


HOOKS = {
    "fit": (
        "setup",
        "on_fit_start",
        "on_sanity_check_end",
        "on_train_start",
        "on_train_batch_end",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_train_epoch_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ),
    "validate": ("on_validation_batch_end", "on_validation_end"),
    "test": ("on_test_batch_end", "on_test_end"),
    "predict": ("on_predict_batch_end",),
}


class Asking(Callback):
    """Asks in a hook, by both functions."""

    def __init__(self, name, function, trace):
        self.refused = []

        def ask(trainer, *_, **__):
            for question in (influence, self_influence):
                with pytest.raises(ValueError, match=rf"in the middle of trainer\.{function}\(\)") as error:
                    question(trainer, *([loader(test_texts())] if question is influence else []), trace=trace)
                self.refused.append(str(error.value))

        setattr(self, name, ask)


@pytest.mark.parametrize(("function", "hook"), [(name, hook) for name, hooks in HOOKS.items() for hook in hooks])
def test_a_question_from_inside_a_run_is_refused_and_the_run_goes_on(trace, function, hook):
    found = []
    for asked in (False, True):
        pl.seed_everything(3, verbose=False)
        module = logging(Toy)()
        module.test_step = module.validation_step
        module.predict_step = lambda batch, batch_idx, module=module: module(batch[0])
        callback = Asking(hook, function, trace)
        trainer = quiet(callbacks=[callback] if asked else [])
        data = [loader(), loader(test_texts())] if function == "fit" else [loader(test_texts())]
        getattr(trainer, function)(module, *data)
        assert bool(callback.refused) is asked
        found.append((module.state_dict(), metrics(trainer), states()))
    (weights, *others), (weights_asked, *others_asked) = found
    assert same_weights(weights, weights_asked)
    assert others == others_asked


def test_a_question_from_a_step_is_refused(tmp_path):
    class Curious(Toy):
        def validation_step(self, batch, batch_idx):
            influence(self.trainer, loader(test_texts()))

    with pytest.raises(ValueError, match=r"in the middle of trainer\.fit\(\).*after trainer\.fit\(\) has returned"):
        quiet(callbacks=[TracInCallback(tmp_path / "trace")]).fit(Curious(), loader(), loader(test_texts()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_was_stopped_is_not_running(tmp_path, error):
    class Stopped(Toy):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                raise error

    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace")])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(Stopped(), loader())
    assert trainer.influence(loader(test_texts())).scores.shape[0] == N_TEST


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize("kind", ["a data set", "a collate function", "a stream"])
def test_what_data_sets_and_modules_hold_is_as_it_was(tmp_path, cache, kind):
    """A fit that goes on after a query must not notice it."""
    train, test = (DATA[kind](HOLDERS["a closure"], GENERATORS["numpy's"], tmp_path) for _ in range(2))
    shuffling = torch.Generator().manual_seed(2)
    loaders = [loader(each.dataset, collate_fn=each.collate_fn, generator=shuffling) for each in (train, test)]
    module = Remembering()
    fit = fitted(tmp_path / "trace", module, loaders[0], cache=cache, on_error="warn", trainer={"max_epochs": 1})
    before = str((train.state(), test.state(), module.remembered(), shuffling.get_state().tolist()))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    if kind == "a stream":  # of another order of words at each reading; what it says of them does not matter here
        loaders[1] = loader(test_texts())
    fit.influence(loaders[1])
    fit.influence(loaders[1], method="tracin-last", train_dataloaders=loaders[0])
    fit.self_influence()
    assert str((train.state(), test.state(), module.remembered(), shuffling.get_state().tolist())) == before
    assert same_weights(weights, module.state_dict())


class WithTable(Toy):
    """Holds numbers that no state dict has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(8), persistent=False)

    def forward(self, ids):
        return super().forward(ids) + 0 * self.table.sum()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_and_their_types_are_as_they_were(tmp_path, precision):
    module = fitted(tmp_path, WithTable()).lightning_module
    before = {name: each.clone() for name, each in [*module.state_dict().items(), ("table", module.table)]}
    quiet(precision=precision).influence(loader(test_texts()), module, trace=tmp_path)
    after = {**module.state_dict(), "table": module.table}
    assert {name: each.dtype for name, each in after.items()} == {name: each.dtype for name, each in before.items()}
    assert same_weights(before, after)
    assert module.dtype == torch.float32
    assert module(test_texts().tensors[0]).dtype == torch.float32


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_autocast_around_a_question_rounds_nothing(tmp_path, cache):
    fit = fitted(tmp_path / "trace", cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fit.influence(loader(test_texts())).scores, fit.self_influence()
        assert torch.is_autocast_enabled("cpu")
    own = fitted(tmp_path / "own", cache=cache)
    assert torch.equal(cast[0], own.influence(loader(test_texts())).scores)
    assert torch.equal(cast[1], own.self_influence())


@pytest.mark.parametrize("ask", [influence, self_influence])
def test_no_logger_is_begun_and_the_file_of_the_fit_stays(tmp_path, ask):
    class Begun(CSVLogger):
        runs = 0

        @property
        def experiment(self):
            type(self).runs += 1
            return super().experiment

    class Logging(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    def trainer():
        return quiet(logger=Begun(tmp_path, "run", version=0), log_every_n_steps=1)

    fit = trainer()
    fit.callbacks.append(TracInCallback(tmp_path / "trace", cache="on_demand"))
    fit.fit(Logging(), loader(texts()))
    file, runs = tmp_path / "run" / "version_0" / "metrics.csv", Begun.runs
    logged = file.read_text()
    options = {"train_dataloaders": loader(texts()), "trace": tmp_path / "trace"}
    for asked in (fit, trainer()):  # the second would empty the folder
        own = asked.loggers
        ask(asked, *([loader(test_texts())] if ask is influence else []), model=Logging(), **options)
        assert asked.loggers == own
    assert (file.read_text(), Begun.runs) == (logged, runs)
