"""Training that would notice: random data, running statistics, accumulated results, frozen parts, other callbacks."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchmetrics import MeanMetric
from toy import CLASSES, N_TRAIN, Toy, fitted, loader, quiet, same_weights, test_texts, texts
from variants import Plain, Stepping

from lightning_tracin import TracInCallback

CALLBACKS = {
    "checkpoint": {},
    "on demand": {"cache": "on_demand"},
    "every 3 steps": {"every_n_train_steps": 3},
    "training": {"cache": "training"},
}


class Augmented(Dataset):
    """Leaves words out at random, by each of the generators that people use."""

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        ids, label = texts()[index]
        ids = ids.clone()
        ids[random.randrange(1, len(ids))] = 0
        ids[np.random.randint(1, len(ids))] = 0  # noqa: NPY002
        ids[int(torch.randint(1, len(ids), ()))] = 0
        return ids, label


class Normed(Toy):
    """Batch norm, whose statistics every forward pass in training mode moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids):
        return self.head(self.dropout(self.norm(self.embedding(ids).mean(1))))


class Frozen(Toy):
    """Keeps a part in eval mode, at every start of an epoch."""

    def on_train_epoch_start(self):
        self.hidden.eval()
        self.hidden.requires_grad_(False)


def outcome(build, callbacks, data, validation=None, **options):
    """Everything that a fit leaves: weights, logged values, training flags, the state of the generators."""
    pl.seed_everything(3, verbose=False)
    module = build()
    trainer = quiet(callbacks=callbacks, **options)
    trainer.fit(module, data(), None if validation is None else validation())
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "logged": dict(trainer.logged_metrics),
        "flags": [part.training for part in module.modules()],
        "generators": (random.random(), float(np.random.rand()), float(torch.rand(()))),  # noqa: NPY002
    }


def assert_untouched(tmp_path, build, data=lambda: loader(shuffle=True), callback=None, **options):
    without = outcome(build, [], data, **options)
    found = outcome(build, [TracInCallback(tmp_path / "trace", **(callback or {}))], data, **options)
    assert same_weights(found.pop("weights"), without.pop("weights"))
    assert found == without
    return without


@pytest.mark.filterwarnings("ignore:.*has batch norm")
@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize("module", [Normed, Frozen])
def test_weights_statistics_and_flags(tmp_path, module, callback):
    assert_untouched(tmp_path, module, callback=callback, accumulate_grad_batches=2)


def validated(module):
    """The module with a validation that draws random numbers, measures, and runs in training mode."""

    class Validated(module):
        def __init__(self):
            super().__init__()
            self.mean_loss = MeanMetric()

        def on_validation_start(self):
            self.train()

        def validation_step(self, batch, batch_idx):
            loss = functional.cross_entropy(self(batch[0]) + torch.rand(CLASSES), batch[1])
            self.mean_loss(loss)
            self.log("val_loss", self.mean_loss)

    return Validated


@pytest.mark.filterwarnings("ignore:.*has batch norm")
@pytest.mark.parametrize(
    "interval",
    [
        pytest.param({}, id="epochs", marks=pytest.mark.slow),
        pytest.param({"val_check_interval": 2}, id="every 2 batches"),
    ],
)
@pytest.mark.parametrize(
    ("module", "callback"),
    [
        (module, CALLBACKS[name])
        for name in ("checkpoint", "every 3 steps", "training")
        for module in (Normed, Frozen, Stepping)
        if (module, name) != (Stepping, "training")
    ],
)
def test_validations_that_are_logged(tmp_path, module, interval, callback):
    own = {"accumulate_grad_batches": 2} if module is not Stepping else {}
    options = {**own, **interval, "logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    logging = {"log_examples": 2, **callback}
    logged = assert_untouched(
        tmp_path, validated(module), callback=logging, validation=lambda: loader(Augmented(), shuffle=True), **options
    )["logged"]
    assert "val_loss" in logged
    assert len(list(tmp_path.rglob("influential.jsonl"))) == 1


@pytest.mark.parametrize("callback", [each for name, each in CALLBACKS.items() if name != "training"])
def test_manual_optimization(tmp_path, callback):
    assert_untouched(tmp_path, Stepping, callback=callback)


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_data_that_are_drawn_at_random(tmp_path, workers, callback):
    without = assert_untouched(tmp_path, Toy, lambda: loader(Augmented(), shuffle=True, num_workers=workers), callback)
    plain = outcome(Toy, [], lambda: loader(shuffle=True, num_workers=workers))
    assert workers or plain["generators"] != without["generators"]  # so that the data do draw from them


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_a_loader_with_a_generator_of_its_own(tmp_path, callback):
    assert_untouched(tmp_path, Toy, lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(8)), callback)


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_logged_and_measured_values_of_a_plain_module(tmp_path, workers, callback):
    logged = assert_untouched(
        tmp_path, Plain, lambda: loader(shuffle=True, num_workers=workers), callback, accumulate_grad_batches=2
    )["logged"]
    assert {"loss_epoch", "accuracy"} <= logged.keys()


class Remembering(pl.LightningModule):
    """No mixin. training_step keeps something for later, in one of the ways that Lightning's own guides show."""

    def __init__(self, how):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, CLASSES)
        self.how = how
        self.outputs = []
        self.calls = 0
        self.register_buffer("running", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1])
        if self.how == "list":
            self.outputs.append(loss.detach())
        elif self.how == "counter":
            self.calls += 1
        else:
            self.running += 0.5 * (loss.detach() - self.running)
        return loss

    def on_train_epoch_end(self):
        self.log("loss_of_epoch", torch.stack(self.outputs).mean() if self.outputs else self.running)
        self.log("calls", float(self.calls))
        self.outputs.clear()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize("how", ["list", "counter", "buffer"])
def test_what_a_plain_training_step_remembers(tmp_path, how, callback):
    assert_untouched(tmp_path, lambda: Remembering(how), callback=callback)


def test_influence_leaves_what_a_plain_training_step_remembers(tmp_path):
    module = Remembering("list")
    trainer = fitted(tmp_path / "trace", module)
    module.outputs.clear()
    trainer.influence(loader(test_texts()))
    assert module.outputs == []


class Counting(Callback):
    """Counts its own hooks."""

    def __init__(self):
        self.called = []

    def __getattribute__(self, name):
        if name.startswith("on_predict"):
            self.called.append(name)
        return super().__getattribute__(name)


def test_other_callbacks_neither_see_influence_nor_change(tmp_path):
    saver, counting = ModelCheckpoint(tmp_path / "saved", monitor="loss", filename="best"), Counting()

    class Logging(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace"), counting, saver], enable_checkpointing=True)
    trainer.fit(Logging(), loader())
    before, hooks = copy.deepcopy(saver.state_dict()), list(counting.called)
    assert before["best_model_path"]
    trainer.influence(loader(test_texts()))
    trainer.self_influence()
    assert saver.state_dict() == before
    assert counting.called == hooks
    assert trainer.callbacks[-1] is saver


@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
def test_influence_gives_weights_flags_and_trainer_back(tmp_path, fails):
    class Own(Toy):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.influence_loss(batch).mean())

        def predict_step(self, batch, batch_idx):
            return "mine"

    trainer = fitted(tmp_path / "trace", Own())
    module = trainer.lightning_module
    module.hidden.eval()
    nn.init.ones_(module.hidden.bias)  # weights of no checkpoint
    weights = copy.deepcopy(module.state_dict())
    flags = {name: part.training for name, part in module.named_modules()}
    settings = {name: getattr(trainer, name) for name in ("callbacks", "limit_predict_batches", "max_epochs")}
    data = loader(test_texts())
    if fails:
        ids, labels = test_texts().tensors
        with pytest.raises(IndexError):  # of no class: an error in the middle of a pass
            trainer.influence(loader(torch.utils.data.TensorDataset(ids, labels + 3 * (labels == labels[-1]))))
    else:
        trainer.influence(data)
    assert same_weights(weights, module.state_dict())
    assert flags == {name: part.training for name, part in module.named_modules()}
    assert settings == {name: getattr(trainer, name) for name in settings}
    assert trainer.predict(module, data) == ["mine"] * len(data)
    assert trainer.test(module, data, verbose=False)[0]["test_loss"] > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_same_trainer_fits_on_after_influence(tmp_path):
    outcomes = []
    for asks in (False, True):
        trainer = fitted(tmp_path / f"{asks}", overwrite=True)
        if asks:
            trainer.influence(loader(test_texts()))
        pl.seed_everything(5, verbose=False)
        trainer.fit_loop.max_epochs += 1
        trainer.fit(trainer.lightning_module, loader())
        outcomes.append((trainer.lightning_module.state_dict(), trainer.callbacks[0].trace.checkpoints[-1].step))
        assert len(trainer.callbacks[0].trace.checkpoints) == 3
    assert same_weights(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


class Nested(pl.LightningModule):
    """No mixin. Its metric lies two containers down, and is logged by what it has seen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, CLASSES)
        self.metrics = nn.ModuleDict({"fit": nn.ModuleDict({"mean_loss": MeanMetric()})})

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1])
        self.metrics["fit"]["mean_loss"].update(loss)
        return loss

    def on_train_epoch_end(self):
        self.log("mean", self.metrics["fit"]["mean_loss"].compute())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_metrics_in_containers_of_a_plain_module(tmp_path, callback):
    assert "mean" in assert_untouched(tmp_path, Nested, callback=callback)["logged"]
