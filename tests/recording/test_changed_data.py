"""A data set that is changed under its loader between epochs, by a callback: shuffled in place, or added to."""

from __future__ import annotations

import random

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from toy import N_TRAIN, STEPS_PER_EPOCH, Toy, loader, quiet, test_texts, texts

from lightning_tracin import Trace, TracInCallback

CACHES = ["checkpoint", "training", "on_demand"]


class Texts(torch.utils.data.Dataset):
    """The texts, and a few more that it does not have yet; some of them changed as they are read."""

    def __init__(self, kind: str = "") -> None:
        self.order = list(range(N_TRAIN))
        self.rows = texts(N_TRAIN + 8)
        self.kind = kind
        self.own = random.Random(0)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index):
        ids, label = self.rows[self.order[index % len(self)]]
        draw = {"global": torch.rand(()).item, "own": self.own.random}.get(self.kind)
        return (ids.flip(0) if draw is not None and draw() < 0.5 else ids), label


class Changes(pl.Callback):
    """Changes the data set, at the beginning of the second epoch or the end of the first."""

    def __init__(self, change, hook="on_train_epoch_start") -> None:
        self.change = change
        self.epoch = 1 if hook == "on_train_epoch_start" else 0
        setattr(self, hook, self._act)

    def _act(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.change(trainer.train_dataloader.dataset)


def shuffle(data):
    random.Random(0).shuffle(data.order)


def grow(data):
    data.order += range(N_TRAIN, N_TRAIN + 8)


def randomise(data):
    data.kind = "own"


def fit(path, data, change=None, hook="on_train_epoch_start", *, on_error="raise", epochs=2, **options):
    pl.seed_everything(0, verbose=False)
    callback = TracInCallback(path, dtype="float32", on_error=on_error, **options)
    changes = [] if change is None else [Changes(change, hook)]
    callbacks = [callback, *changes] if hook == "on_train_epoch_start" else [*changes, callback]
    trainer = quiet(callbacks=callbacks, max_epochs=epochs)
    trainer.fit(Toy(), data if isinstance(data, DataLoader) else loader(data, shuffle=True))
    return trainer


OTHER = "data set was changed during the fit, and has other examples, or the same in another order: gradients"
ENDED = {
    "shuffled": (shuffle, {"shuffle": True}, OTHER),
    "added to": (grow, {"shuffle": True}, r"A sampler asks for example 2\d of a data set that had 20 examples"),
    "added to, and not drawn": (
        grow,
        {"sampler": range(N_TRAIN)},
        "was changed during the fit, and has 28 examples instead of 20",
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("change", "drawn", "why"), ENDED.values(), ids=ENDED)
def test_recording_ends_before_anything_is_under_another_number(tmp_path, change, drawn, why, cache):
    def data():
        return loader(Texts(), **drawn)

    with pytest.warns(UserWarning, match=f"stopped recording at step .*{why}"):
        fit(tmp_path / "trace", data(), change, on_error="warn", cache=cache)
    one = fit(tmp_path / "one", data(), epochs=1, cache=cache)
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [STEPS_PER_EPOCH]
    expected = one.influence(loader(test_texts())).scores
    assert torch.equal(
        quiet().influence(loader(test_texts()), Toy(), train_dataloaders=data(), trace=trace.path).scores, expected
    )


def test_a_data_set_that_is_shuffled_before_the_pass(tmp_path):
    """At the end of the epoch, by a callback that comes first: the pass would read the examples of the next one."""
    with pytest.raises(ValueError, match=OTHER):
        fit(tmp_path, Texts(), shuffle, "on_train_epoch_end")
    assert Trace(tmp_path).checkpoints == []


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["global", "own"])
def test_examples_that_are_changed_at_random_are_the_same(tmp_path, kind, cache):
    trace = fit(tmp_path, Texts(kind), cache=cache).callbacks[0].trace
    assert len(trace.checkpoints) == 2


def test_examples_that_are_changed_at_random_later(tmp_path):
    """As those of a small data set, which by chance were alike twice before training."""
    assert len(fit(tmp_path, Texts(), randomise, cache="training").callbacks[0].trace.checkpoints) == 2


def test_it_is_read_once_an_epoch(tmp_path):
    class Counting(Texts):
        n_read = 0

        def __getitem__(self, index):
            self.n_read += 1
            return super().__getitem__(index)

    often, once = Counting(), Counting()
    fit(tmp_path / "often", often, cache="training", every_n_train_steps=1)
    fit(tmp_path / "once", once, cache="training")
    assert often.n_read == once.n_read
