"""Validations that two processes log, against one."""

from __future__ import annotations

import pytest
import torch
from logged_fits import assert_scores, at_checkpoint, examples_of, read
from logging_processes import validation_texts
from processes_apart import Normed
from toy import EPOCHS, Toy, loader, quiet

from lightning_tracin import Trace


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks):
    """What fits of two processes left."""
    folder = tmp_path_factory.mktemp("two")
    done = forks.run_two(folder, script="logging_processes.py")
    assert done.returncode == 0, done.stderr
    return folder


def rows_of_two(folder, name):
    """The one table that two processes wrote."""
    (file,) = (folder / name).rglob("influential.jsonl")
    return read(file)


@pytest.mark.parametrize("name", ["highest", "all"])
def test_two_processes_log_what_one_finds_in_their_trace(two, name):
    rows = rows_of_two(two, name)
    trace = Trace(two / name / "trace")
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)
    for epoch in range(EPOCHS):
        own = [row for row in rows if row["epoch"] == epoch]
        losses, _ = at_checkpoint(trace, epoch, validation_texts())
        assert examples_of(own) == [
            (0, index) for index in losses.argsort(descending=True)[: 3 if name == "highest" else 7]
        ]
        for row in own:
            assert row["loss"] == pytest.approx(float(losses[row["test_index"]]), rel=1e-5)
            assert row["test_text"] == " ".join(
                str(int(token)) for token in validation_texts()[row["test_index"]][0] if token
            )
    result = quiet().influence(loader(validation_texts()), Toy(), trace=trace)
    assert_scores(own, result.scores)


def test_given_examples_of_two_processes(two):
    rows = rows_of_two(two, "given")
    assert examples_of(rows) == [(0, 6), (0, 0), (0, 1)]
    result = quiet().influence(loader(validation_texts()), Toy(), trace=two / "given" / "trace")
    assert_scores([row for row in rows if row["epoch"] == 1], result.scores)


def test_training_of_two_processes_is_what_it_is_without_a_log(two):
    first, second = (torch.load(two / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    for left in (first, second):
        for name in ("highest", "all", "given", "normed"):
            without = "normed without" if name == "normed" else "without"
            for weight in (Normed() if name == "normed" else Toy()).state_dict():
                assert torch.equal(left[f"{name} {weight}"], left[f"{without} {weight}"]), (name, weight)


def test_an_error_in_the_validation_of_one_process_is_raised_in_both(two):
    for rank in (0, 1):
        assert "no losses here" in (two / f"error-{rank}.txt").read_text()
    assert {row["epoch"] for row in rows_of_two(two, "broken")} == {0}
