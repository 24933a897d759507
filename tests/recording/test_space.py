"""The disk: enough space is asked for before a fit, and one that fills up later loses nothing."""

from __future__ import annotations

import ast
import re
import shutil
import warnings
from collections import namedtuple

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler
from toy import VOCABULARY, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import Trace, TracInCallback, TracInMixin
from lightning_tracin.storage import files


def only(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - free, free))


def bytes_of(size: str) -> float:
    number, unit = size.split()
    return float(number.replace(",", "")) * {"bytes": 1, "kB": 1e3, "MB": 1e6}[unit]


def enough_for_one(monkeypatch, fit) -> float:
    """As much as a fit's next checkpoint needs, as the error says, and half of that again; in bytes."""
    only(monkeypatch, 1)
    with pytest.raises(OSError, match="nothing was written") as raised:
        fit()
    size, unit = re.search(r"needs about ([0-9.]+) (bytes|kB) for 1 checkpoint of 20", str(raised.value)).groups()
    needed = float(size) * {"bytes": 1, "kB": 1000}[unit]
    only(monkeypatch, int(1.5 * needed))
    return needed


def test_a_disk_without_enough_space_for_one_checkpoint(tmp_path, monkeypatch):
    only(monkeypatch, 2000)
    alone = r'This fits, for one checkpoint: methods=\("tracin-last",\), dtype="int8", keep_weights=False \(2\.0 kB\)'
    with pytest.raises(OSError, match=rf"needs about 8\.9 kB for 1 checkpoint of 20.*2\.0 kB are free.*{alone}"):
        fitted(tmp_path / "trace")
    assert not (tmp_path / "trace").exists()


def test_a_disk_that_nothing_fits_on(tmp_path, monkeypatch):
    only(monkeypatch, 100)
    with pytest.raises(OSError, match=r"Not even methods=.*keep_weights=False fits \(2\.0 kB .*Free some space"):
        fitted(tmp_path / "trace")


class Speaker(TracInMixin, pl.LightningModule):
    """A language model whose head takes more space than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.wide = nn.Linear(8, 100)
        self.head = nn.Linear(100, 1500)

    def influence_loss(self, batch):
        ids, _ = batch
        logits = self.head(self.wide(self.embedding(ids[:, :-1])))
        return functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


OPTION = re.compile(r"([\w]+)=(\([^)]*\)|\"[^\"]*\"|\w+)")


def options_named(saver: str) -> dict:
    """A saver, as a message names it, as arguments of the callback."""
    return {name: ast.literal_eval(value) for name, value in OPTION.findall(saver.rpartition(" (")[0])}


@pytest.mark.parametrize(("module", "share"), [(Toy, 0.7), (Speaker, 0.35), (Speaker, 0.8)])
def test_what_is_named_really_fits(tmp_path, monkeypatch, module, share):
    """Each is tried: on a disk of that size it records without an error or a warning, and takes what was said."""
    only(monkeypatch, 1)
    data = DataLoader(texts(60, length=12), batch_size=20, shuffle=True)
    with pytest.raises(OSError, match="needs about") as raised:
        fitted(tmp_path / "none", module(), data, trainer={"max_epochs": 1})
    needed = bytes_of(re.search(r"needs about ([\d.]+ \w+)", str(raised.value))[1])
    free = int(share * needed)
    only(monkeypatch, free)
    with pytest.raises(OSError, match="Each of these fits") as raised:
        fitted(tmp_path / "none", module(), data, trainer={"max_epochs": 1})
    savers = str(raised.value).rpartition("Each of these fits: ")[2].rstrip(".").split("; ")
    assert len(savers) > (module is Speaker and share > 0.5)
    for number, saver in enumerate(savers):
        path = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fitted(path, module(), data, trainer={"max_epochs": 1}, **options_named(saver))
        stored = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
        assert stored < 1.35 * free  # of so small files a good part is headers
        assert stored == pytest.approx(bytes_of(saver.rpartition(" (")[2].rstrip(")")), rel=0.5)


def test_the_head_of_a_language_model_is_left_out(tmp_path, monkeypatch):
    only(monkeypatch, 800_000)
    with pytest.raises(OSError, match=r'Each of these fits: (?!.*tracin-last).*methods=\("tracin-we",\) \('):
        fitted(tmp_path / "trace", Speaker(), DataLoader(texts(60, length=12), batch_size=4))


def test_fewer_checkpoints_are_named_with_their_interval(tmp_path, monkeypatch):
    needed = enough_for_one(monkeypatch, lambda: fitted(tmp_path / "trace", trainer={"max_epochs": 4}))
    only(monkeypatch, int(2.5 * needed))
    with pytest.warns(UserWarning, match=r"for 4 checkpoints of 20.*every_n_epochs=2 \("):
        fitted(tmp_path / "trace", trainer={"max_epochs": 4})
    fitted(tmp_path / "rarer", trainer={"max_epochs": 4}, every_n_epochs=2)  # warnings are errors
    assert len(Trace(tmp_path / "rarer").checkpoints) == 2


@pytest.mark.parametrize(("on_error", "ends"), [("warn", "the recording"), ("raise", "the fit")])
def test_a_disk_with_enough_space_for_one_checkpoint_is_warned_of(tmp_path, monkeypatch, on_error, ends):
    """The fit may stop early; what is expected of it is no reason to refuse it."""
    enough_for_one(monkeypatch, lambda: fitted(tmp_path / "trace"))
    match = rf"(?s)kB for 2 checkpoints of 20.* kB are free. If the disk fills up, {ends} ends there.*methods="
    with pytest.warns(UserWarning, match=match):
        fitted(tmp_path / "trace", on_error=on_error)
    assert len(Trace(tmp_path / "trace").checkpoints) == 2


@pytest.mark.parametrize("epochs", [-1, 10**9])
def test_the_space_needed_is_bounded_by_max_steps(tmp_path, monkeypatch, epochs):
    limits = {"max_epochs": epochs, "max_steps": 5, "accumulate_grad_batches": 3}  # 2 steps of each epoch's 5 batches
    enough_for_one(monkeypatch, lambda: fitted(tmp_path / "trace", trainer=limits))
    with pytest.warns(UserWarning, match="for 3 checkpoints of 20"):
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

    def fit():
        callbacks = [*limits.get("callbacks", ()), TracInCallback(tmp_path, every_n_train_steps=2)]
        quiet(**{**limits, "callbacks": callbacks}).fit(Toy(), loader())

    enough_for_one(monkeypatch, fit)
    with pytest.warns(UserWarning, match=f"for {expected} checkpoints of 20"):
        fit()


def test_the_space_needed_by_a_resumed_fit_is_that_of_the_steps_to_come(tmp_path, monkeypatch):
    fit = fitted(tmp_path / "trace", every_n_train_steps=2, dtype="float16")
    fit.save_checkpoint(tmp_path / "fit.ckpt")

    def resume():
        resumed = quiet(callbacks=[TracInCallback(tmp_path / "trace", every_n_train_steps=2)], max_epochs=3)
        resumed.fit(Toy(), loader(), ckpt_path=tmp_path / "fit.ckpt")

    enough_for_one(monkeypatch, resume)
    with pytest.warns(UserWarning, match="for 2 checkpoints of 20"):  # after steps 12 and 14
        resume()


def test_the_space_needed_is_that_of_the_examples_that_are_drawn(tmp_path, monkeypatch):
    """An estimate of a fold that held the others too would be five times what is written."""
    options = {"dtype": "float32", "methods": ("wide",), "keep_weights": False}
    sizes = {
        n_drawn: enough_for_one(
            monkeypatch,
            lambda n=n_drawn: fitted(
                tmp_path / "trace", Speaker(), loader(sampler=SubsetRandomSampler(range(n))), **options
            ),
        )
        for n_drawn in (20, 4)
    }
    assert sizes[4] / sizes[20] == pytest.approx(1 / 5, rel=0.1)


class Wide(Toy):
    """With 4 MB that nothing reads."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.base = nn.Linear(1000, 1000).requires_grad_(not frozen)


def test_frozen_weights_need_space_once(tmp_path, monkeypatch):
    only(monkeypatch, 6 * 10**6)
    with pytest.warns(UserWarning, match=r"needs about 8\.\d MB for 2 checkpoints"):
        fitted(tmp_path / "moving", Wide(frozen=False))
    fitted(tmp_path / "trace", Wide(frozen=True))
    sizes = [path.stat().st_size for path in (tmp_path / "trace").rglob("*.safetensors")]
    assert 4 * 10**6 < sum(sizes) < 5 * 10**6


def test_batches_that_are_sorted_on_disk_need_space_twice(tmp_path, monkeypatch):
    only(monkeypatch, 5000)
    data, needed = texts(4000), []
    for options in ({"batch_size": 4}, {"batch_sampler": [[0, 1, 2, 3]]}):
        with pytest.raises(OSError, match="MB for 1 checkpoint ") as error:
            fitted(tmp_path / "trace", data=DataLoader(data, **options), trainer={"max_epochs": 1})
        needed.append(float(re.search(r"needs about ([\d.]+) MB", str(error.value))[1]))
    assert needed[1] == pytest.approx(2 * needed[0], rel=0.2)  # but for the texts


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
