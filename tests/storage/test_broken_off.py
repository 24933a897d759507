"""Beginning, branching and cutting a trace, broken off anywhere: what is left is whole or no trace, in nobody's way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import fitted

from lightning_tracin import Trace
from lightning_tracin.storage.trace import TraceHeader
from lightning_tracin.storage.verification import verify


@pytest.fixture
def long(tmp_path):
    """A trace of four checkpoints."""
    fitted(tmp_path / "trace", trainer={"max_epochs": 4})
    return Trace(tmp_path / "trace")


def header_of(trace: Trace) -> TraceHeader:
    names = ("n_train", "data_fingerprint", "model_fingerprint", "model_class", "sites", "dtype", "shard_examples")
    return TraceHeader(**{name: getattr(trace, name) for name in names})


def broken_off(act: Callable[[], object], monkeypatch, n: int) -> bool:
    """Whether an act is broken off, without any tidying up, before its n-th change of a name on disk."""
    left = n

    def counting(change):
        def counted(*args, **options):
            nonlocal left
            left -= 1
            if left <= 0:
                raise KeyboardInterrupt
            return change(*args, **options)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", counting(os.link))
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
        try:
            act()
        except KeyboardInterrupt:
            return True
    return False


def problems(trace: Trace) -> list[str]:
    return [str(problem) for _, problem in verify(trace) if problem and "was left behind" not in str(problem)]


def steps(trace: Trace) -> list[int]:
    return [each.step for each in trace.checkpoints]


def test_cutting(long, monkeypatch):
    seen = []
    for n in range(1, 200):
        if not broken_off(lambda: long.drop_checkpoints_after(5), monkeypatch, n):
            break
        seen.append(len(steps(long)))
        assert steps(long) == [5, 10, 15, 20][: seen[-1]]
        assert not problems(long)
    assert (steps(long), seen[0]) == ([5], 4)
    assert not [problem for _, problem in verify(long) if problem]
    assert not list(long.path.rglob("*.partial"))


def test_branching(long, tmp_path, monkeypatch):
    other = tmp_path / "other"
    for n in range(1, 200):
        if not broken_off(lambda: long.branch(other, 10), monkeypatch, n):
            break
        with pytest.raises(FileNotFoundError, match=r"There is no trace in|was being replaced by that of"):
            Trace(other)
    assert n > 20
    assert steps(Trace(other)) == [5, 10]
    assert not [problem for _, problem in verify(Trace(other)) if problem]
    assert steps(long) == [5, 10, 15, 20]


def test_beginning(long, tmp_path):
    """The temporary file of the first header has no header yet that says whose it is."""
    path = tmp_path / "begun"
    path.mkdir()
    (path / "trace.json.0123abcd.partial").write_text("{")
    trace = Trace.create(path, header_of(long))
    assert [each.name for each in path.iterdir()] == ["trace.json"]
    assert trace.n_train == long.n_train


def test_a_checkpoint_in_which_somebody_keeps_a_file_is_not_cut(long):
    note = long.checkpoints[2].path / "note.txt"
    note.write_text("mine")
    with pytest.raises(FileExistsError, match=r"step-000000015/note.txt, which no trace wrote, in a checkpoint that"):
        long.drop_checkpoints_after(5)
    assert steps(long) == [5, 10, 15, 20]
    long.drop_checkpoints_after(15)
    assert note.read_text() == "mine"
