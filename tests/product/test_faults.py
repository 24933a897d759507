"""Damaged files, full disks, killed processes: never a wrong score."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import signal

import pytest
import torch
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInWE


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
@pytest.mark.parametrize("name", ["words/00000.safetensors", "weights.safetensors", "second-moments-words.safetensors"])
def test_a_damaged_file_is_named(tmp_path, trace, name, damage):
    shutil.copytree(trace, tmp_path / "trace")
    damage(Trace(tmp_path / "trace").checkpoints[1].path / name)
    method = TracInWE(precondition="adam")
    with pytest.raises(ValueError, match=f"{name.split('/')[-1]} is damaged"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace", method=method)


@pytest.mark.parametrize("name", ["words/00000.safetensors", "weights.safetensors"])
def test_a_missing_file_is_named(tmp_path, trace, name):
    shutil.copytree(trace, tmp_path / "trace")
    path = Trace(tmp_path / "trace").checkpoints[1].path / name
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing.*remove its folder: the next influence"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace")


def test_damaged_gradients_can_be_removed_and_computed_again(tmp_path):
    fit = fitted(tmp_path / "trace")
    expected = fit.influence(loader(test_texts())).scores
    folder = Trace(tmp_path / "trace").checkpoints[0].path / "words"
    flip_a_bit(folder / "00000.safetensors")
    with pytest.raises(ValueError, match="it is enough to remove its folder"):
        fit.influence(loader(test_texts()))
    shutil.rmtree(folder)
    torch.testing.assert_close(fit.influence(loader(test_texts())).scores, expected, rtol=1e-4, atol=1e-9)


def test_a_file_system_that_takes_no_more_is_an_error_and_keeps_what_was_complete(tmp_path):
    """The kernel's own limit on the size of a file stands in for a full disk: real writes that really fail."""

    def fit_until_full(connection):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            fitted(tmp_path / "trace", methods=("tracin-last",))
            connection.send("no error")
        except OSError as error:
            connection.send(str(error))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=fit_until_full, args=(theirs,))
    child.start()
    assert ours.poll(60)
    message = ours.recv()
    child.join()
    assert "could not be written" in message
    assert "File too large" in message
    assert Trace(tmp_path / "trace").checkpoints == []
    assert not list(tmp_path.rglob("*.partial"))


def test_processes_that_are_killed_leave_nothing_wrong(forks, tmp_path):
    """A few kills; `make torture` has some hundred. What is wrong is printed, with how to repeat it."""
    done = forks.run("-m", "torture.killer", tmp_path / "kills", "--kills", "2", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 2" in done.stdout or "'kills': 3" in done.stdout
