"""The disk: enough space is asked for before a fit, and one that fills up later loses nothing."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple

import pytest
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader
from toy import Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.storage import files


def test_a_disk_without_enough_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(
        OSError, match=r"(?s)needs about .* MB for 2 checkpoints of 20.*0\.0 MB are free.*top_words.*dtype"
    ):
        fitted(tmp_path / "trace")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("epochs", [-1, 10**9])
def test_the_space_needed_is_bounded_by_max_steps(tmp_path, monkeypatch, epochs):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    limits = {"max_epochs": epochs, "max_steps": 5, "accumulate_grad_batches": 3}  # 2 steps of each epoch's 5 batches
    with pytest.raises(OSError, match="for 3 checkpoints of 20"):
        fitted(tmp_path / "trace", trainer=limits)
    monkeypatch.undo()
    fitted(tmp_path / "trace", trainer=limits)
    assert len(Trace(tmp_path / "trace").checkpoints) == 3


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 5),  # 10 steps in 2 epochs
        ({"accumulate_grad_batches": 2}, 3),  # 3 steps of each epoch's 5 batches
        ({"max_epochs": 4}, 10),
        ({"max_epochs": 4, "max_steps": 6}, 3),
        ({"max_epochs": -1, "max_steps": 7}, 3),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, 5),  # it has yet to begin
    ],
)
def test_the_space_needed_by_checkpoints_of_every_second_step(tmp_path, monkeypatch, limits, expected):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    callbacks = [*limits.get("callbacks", ()), TracInCallback(tmp_path, every_n_train_steps=2)]
    with pytest.raises(OSError, match=f"for {expected} checkpoints of 20"):
        quiet(**{**limits, "callbacks": callbacks}).fit(Toy(), loader())


def test_the_space_needed_by_a_resumed_fit_is_that_of_the_steps_to_come(tmp_path, monkeypatch):
    fit = fitted(tmp_path / "trace", every_n_train_steps=2)
    fit.save_checkpoint(tmp_path / "fit.ckpt")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    resumed = quiet(callbacks=[TracInCallback(tmp_path / "trace", every_n_train_steps=2)], max_epochs=3)
    with pytest.raises(OSError, match="for 2 checkpoints of 20"):  # after steps 12 and 14
        resumed.fit(Toy(), loader(), ckpt_path=tmp_path / "fit.ckpt")


class Wide(Toy):
    """With 4 MB that nothing reads."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.base = nn.Linear(1000, 1000).requires_grad_(not frozen)


def test_frozen_weights_need_space_once(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**8, 10**8 - 6 * 10**6, 6 * 10**6))
    with pytest.raises(OSError, match=r"needs about 8\.\d MB for 2 checkpoints"):
        fitted(tmp_path / "moving", Wide(frozen=False))
    fitted(tmp_path / "trace", Wide(frozen=True))
    sizes = [path.stat().st_size for path in (tmp_path / "trace").rglob("*.safetensors")]
    assert 4 * 10**6 < sum(sizes) < 5 * 10**6


def test_batches_that_are_sorted_on_disk_need_space_twice(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    data, needed = texts(4000), []
    for options in ({"batch_size": 4}, {"batch_sampler": [[0, 1, 2, 3]]}):
        with pytest.raises(OSError, match="MB for 1 checkpoints") as error:
            fitted(tmp_path / "trace", data=DataLoader(data, **options), trainer={"max_epochs": 1})
        needed.append(float(re.search(r"needs about ([\d.]+) MB", str(error.value))[1]))
    assert needed[1] == pytest.approx(2 * needed[0], rel=0.1)


def test_a_disk_that_fills_up_later(tmp_path, monkeypatch):
    calls = []
    save = files.save_file

    def fill(tensors, path, **options):
        calls.append(path)
        if "step-000000010" in str(path) and "linear-0" in str(path.parent):
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        fitted(tmp_path / "trace")
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5]
    assert not list(tmp_path.rglob("*.partial"))
    assert quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores.abs().sum() > 0
