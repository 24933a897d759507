"""JSON files of a trace: they read back exactly, and one that has changed is named, never believed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from stored_files import flipped
from toy import RATE

from lightning_tracin import Trace
from lightning_tracin.storage import files
from lightning_tracin.storage.shards import Shards
from lightning_tracin.storage.verification import verify

CHECKPOINT = "checkpoints/step-000000005"
N_FLIPS = 75

# What reads each kind of file, as queries and fits do.
READERS = {
    "trace.json": lambda path: vars(Trace(path.parent)),
    "vocabulary.json": lambda path: Trace(path.parent).vocabulary,
    "texts/index.json": lambda path: Shards.open(path.parent),
    f"{CHECKPOINT}/words/index.json": lambda path: Shards.open(path.parent),
    f"{CHECKPOINT}/checkpoint.json": lambda path: Trace(path.parents[2]).read_checkpoint(path),
}


@pytest.fixture
def copied(trace, tmp_path):
    """A copy of the trace, to be damaged."""
    return Path(shutil.copytree(trace, tmp_path / "copied"))


def problems(trace):
    return [problem for _, problem in verify(trace) if problem]


@pytest.mark.parametrize("name", READERS)
def test_a_bit_of_json_that_flips_is_an_error_or_changes_nothing(copied, name):
    path, read = copied / name, READERS[name]
    intact, expected = path.read_bytes(), read(path)
    n_errors = 0
    for bit in random.Random(0).sample(range(8 * len(intact)), N_FLIPS):
        flipped(path, bit)
        try:
            assert read(path) == expected, f"bit {bit}: {intact!r}"
        except ValueError as error:
            assert f"{path} is damaged: " in str(error)  # noqa: PT017 (or nothing is raised)
            n_errors += 1
        path.write_bytes(intact)
    assert n_errors >= 0.9 * N_FLIPS  # the exponent 1e-05 may as well be written 1E-05


@pytest.mark.parametrize("name", READERS)
def test_json_holds_its_checksum_last(copied, name):
    content = json.loads((copied / name).read_text(encoding="utf-8"))
    assert list(content)[-1] == "checksum"
    del content["checksum"]
    assert files.read_json(copied / name) == content
    (copied / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name} is damaged: there is no checksum in it"):
        READERS[name](copied / name)


def test_a_learning_rate_that_was_changed_is_noticed(copied):
    opened, path = Trace(copied), copied / CHECKPOINT / "checkpoint.json"
    text = path.read_text()
    assert text.count(f" {RATE}\n") == 1  # of the first step
    path.write_text(text.replace(f" {RATE}\n", " 0.07\n"))
    message = f"{path} is damaged: its content has the checksum .* was written. Restore the file from a copy"
    for trace in (opened, Trace(copied)):
        with pytest.raises(ValueError, match=message):
            _ = trace.checkpoints
        (problem,) = problems(trace)
        assert problem.startswith(f"{path} is damaged: ")
    path.write_text(text)
    assert not problems(opened)


def test_a_header_that_changes_while_its_trace_is_open_is_noticed(copied):
    trace, path = Trace(copied), copied / "trace.json"
    path.write_text(path.read_text().replace('"n_train": 20', '"n_train": 21'))
    assert [problem.split(" is damaged: ")[0] for problem in problems(trace)] == [str(path)]


def test_layout_is_no_content(copied):
    for path in copied.rglob("*.json"):
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_text(encoding="utf-8")).items()))))
    assert not problems(Trace(copied))


def test_numbers_and_words_read_back_exactly(tmp_path):
    floats = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates = [*floats.tolist(), *(floats * 1e-300).tolist(), 0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1e16]
    path = tmp_path / "a.json"
    files.write_json(path, {"rates": rates, "words": {30: 'ü \u2028\n"', 4: "\x00\U0001f600"}, "steps": ((1, 2.0),)})
    content = files.read_json(path)
    assert [repr(rate) for rate in content["rates"]] == [repr(rate) for rate in rates]
    assert content["words"] == {"30": 'ü \u2028\n"', "4": "\x00\U0001f600"}
    assert repr(content["steps"]) == "[[1, 2.0]]"


def test_what_is_written_again_gets_a_checksum_of_its_own(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    files.write_json(path, {**json.loads(path.read_text()), "y": 2})
    assert files.read_json(path) == {"x": 1, "y": 2}


@pytest.mark.parametrize("text", ["", "[]", "3", '"checksum"', "null", '{"x": 1}', '{"x": 1, "checksum": null}'])
def test_other_json_is_no_file_of_ours(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        files.read_json(tmp_path / "a.json")


def test_a_trace_of_before_there_were_checksums_is_of_another_version(tmp_path):
    (tmp_path / "trace.json").write_text('{"format": "lightning_tracin trace", "version": 1, "layers": {}}')
    with pytest.raises(ValueError, match=r"format version 1, .* reads version 2\. Fit again"):
        Trace(tmp_path)
