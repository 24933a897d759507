"""Files that a stranger made: an error that names the file, never another exception, a hang, or a wrong number."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from mutated_files import rehash
from mutations import mutated_readings
from safetensors.torch import load_file, save_file
from toy import N_TRAIN, Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInLast, TracInWE
from lightning_tracin.storage import files, schemas
from lightning_tracin.storage.verification import verify

STEP = "checkpoints/step-000000005"
SHARD = f"{STEP}/words/00000.safetensors"


@pytest.fixture
def copied(trace, tmp_path):
    """A copy of the trace, to be mutated."""
    return Path(shutil.copytree(trace, tmp_path / "copied"))


def change_json(copied, name, **changes):
    files.write_json(copied / name, {**files.read_json(copied / name), **changes})


def problems(copied):
    return [problem for _, problem in verify(Trace(copied)) if problem]


def test_mutated_files_are_read_or_refused(tmp_path):
    found = mutated_readings(120, 0, tmp_path)
    assert set(found) <= {"read", "refused"}, found
    assert min(found["read"], found["refused"]) > 15


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../../../etc/passwd", "other.safetensors", "words/00000.safetensors", ""]
)
def test_a_name_in_a_file_is_one_of_ours(copied, name):
    checksums = files.read_json(copied / STEP / "checkpoint.json")["checksums"]
    change_json(copied, f"{STEP}/checkpoint.json", checksums={**checksums, name: "0" * 32})
    (problem,) = problems(copied)
    assert f"{copied / STEP}/checkpoint.json is damaged: Expected `str` matching regex" in problem
    with pytest.raises(ValueError, match="damaged"):
        _ = Trace(copied).checkpoints


@pytest.mark.parametrize(
    "name", ["trace.json", "vocabulary.json", f"{STEP}/checkpoint.json", f"{STEP}/words/index.json", SHARD]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link out"])
def test_what_is_no_file_is_not_waited_for(copied, tmp_path, name, kind):
    path = copied / name
    shutil.move(path, tmp_path / "outside")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link out": tmp_path / "outside"}[kind])
    with pytest.raises((ValueError, OSError), match=str(path)):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)
    if name != "trace.json":
        assert any(str(path) in problem for problem in problems(copied))


def test_a_link_to_itself_is_an_error(copied):
    (copied / SHARD).unlink()
    (copied / SHARD).symlink_to(copied / SHARD)
    with pytest.raises(OSError, match=SHARD):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)
    (problem,) = problems(copied)
    assert SHARD in problem


def test_a_folder_that_is_a_link_is_not_followed_out_of_the_trace(copied, tmp_path):
    shutil.move(copied / STEP / "words", tmp_path / "words")
    (copied / STEP / "words").symlink_to(tmp_path / "words")
    with pytest.raises(ValueError, match=f"{STEP}/words/index.json leads to {tmp_path}/words/index.json, out of"):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)


def test_a_trace_in_a_folder_that_is_a_link_is_read(copied, tmp_path, toy):
    (tmp_path / "link").symlink_to(copied)
    scores = quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "link").scores
    torch.testing.assert_close(scores, toy.influence(loader(test_texts())).scores)
    assert not problems(tmp_path / "link")


def test_a_number_of_examples_is_believed_only_as_far_as_files_hold_them(copied):
    header = copied / "trace.json"
    change_json(copied, "trace.json", n_train=10**9)
    with pytest.raises(ValueError, match=rf"{header} is damaged: Expected `int` <= {2**27} - at `\$.n_train`"):
        Trace(copied)
    claims = {"n_examples": 2**27, "shard_examples": 4096, "checksums": ["0" * 32] * (2**27 // 4096)}
    change_json(copied, "trace.json", n_train=2**27, shard_examples=4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in (f"{STEP}/words", "checkpoints/step-000000010/words"):
        change_json(copied, f"{name}/index.json", **claims)
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged"):
        quiet().self_influence(trace=copied)
    with pytest.raises(FileNotFoundError, match=r"00001\.safetensors is missing"):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_train", True),
        ("n_train", 20.0),
        ("n_train", -1),
        ("n_train", 2**70),
        ("shard_examples", 0),
        ("dtype", "float8"),
        ("sites", []),
        ("sites", {}),
        ("id", "../x"),
        ("more", 1),
    ],
)
def test_a_header_has_its_types_and_ranges(copied, key, value):
    change_json(copied, "trace.json", **{key: value})
    with pytest.raises(ValueError, match=f"{copied}/trace.json is damaged: .*{key}"):
        Trace(copied)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"n_train": NaN}',
        '{"n_train": 1, "n_train": 1}',
        '{"n_train": ' + "9" * 5000 + "}",
        "\ufeff{}",
        '"\\ud800"',
    ],
)
def test_text_that_is_no_header(copied, text):
    (copied / "trace.json").write_text(text)
    with pytest.raises(ValueError, match=f"{copied}/trace.json is damaged: "):
        Trace(copied)


def test_a_key_that_stands_twice_is_refused_even_with_a_checksum(copied):
    path = copied / "vocabulary.json"
    path.write_text(path.read_text().replace('{\n "words"', '{\n "words": {},\n "words"', 1))
    with pytest.raises(ValueError, match=f"{path} is damaged: a key stands in it twice"):
        _ = Trace(copied).vocabulary


@pytest.mark.parametrize("what", ["values", "bytes"])
def test_json_that_would_take_too_much_memory_is_not_parsed(copied, what, monkeypatch):
    path = copied / "vocabulary.json"
    if what == "bytes":
        os.truncate(path, 2**40)  # a sparse file
    else:
        path.write_text("[" + "[]," * 7_000_000 + "[]]")
    with pytest.raises(ValueError, match=f"{path} is damaged: .* are too large: at most"):
        _ = Trace(copied).vocabulary


def test_a_checkpoint_in_the_folder_of_another_step(copied):
    shutil.copytree(copied / STEP, copied / "checkpoints/step-000000007")
    with pytest.raises(ValueError, match=r"step-000000007/checkpoint.json is damaged: it is of step 5"):
        _ = Trace(copied).checkpoints


def test_folders_of_others_beside_the_checkpoints_are_none(copied):
    shutil.copytree(copied / STEP, copied / "checkpoints/step-000000005 (copy)")
    assert [each.step for each in Trace(copied).checkpoints] == [5, 10]
    assert not problems(copied)


def change_tensors(copied, name, change):
    tensors = load_file(copied / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, copied / name)
    rehash(copied)


@pytest.fixture(scope="module")
def small_traces(tmp_path_factory):
    """Traces in all types, with gradients as words, factors and matrices."""
    folder = tmp_path_factory.mktemp("small")
    for dtype in ("float32", "float16", "int8"):
        fitted(folder / dtype, dtype=dtype)
        fitted(folder / f"{dtype}-matrix", dtype=dtype, projection=(2, 2), methods=("tracin-last",))
    return folder


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, float("nan")) for dtype in ("float32", "float16", "int8")),
        *(("float32", float("inf")), ("float16", -float("inf"))),
    ],
)
@pytest.mark.parametrize("place", ["words", "linear-0", "matrix"])
def test_numbers_that_are_none_never_come_into_scores(small_traces, tmp_path, dtype, place, value):
    source = small_traces / (f"{dtype}-matrix" if place == "matrix" else dtype)
    name = f"{STEP}/{'linear-0' if place == 'matrix' else place}/00000.safetensors"
    method = TracInWE() if place == "words" else TracInLast()
    columns = [key for key, tensor in load_file(source / name).items() if tensor.is_floating_point()]
    assert len(columns) >= 2 - (dtype == "int8" and place == "linear-0")
    for column in columns:
        copied = shutil.copytree(source, tmp_path / column)
        change_tensors(copied, name, lambda tensors, column=column: tensors[column].view(-1)[3:4].fill_(value))
        message = f"{copied / name} is damaged: {column} holds"
        for read in (
            lambda copied=copied: quiet().influence(loader(test_texts()), Toy(), trace=copied, method=method),
            lambda copied=copied: quiet().self_influence(trace=copied, method=method),
            lambda copied=copied: (
                Trace(copied).checkpoints[0].gradients(Trace(copied).sites[0 if place != "linear-0" else 1]).read(0)
            ),
        ):
            with pytest.raises(ValueError, match=message):
                read()
        assert [problem.split(" holds")[0] for problem in problems(copied)] == [message.split(" holds")[0]]


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("examples", lambda values: values + N_TRAIN),
        ("examples", lambda values: values - 1),
        ("examples", lambda values: values.flip(0)),
        ("tokens", lambda values: -values),
        ("tokens", lambda values: values.flip(0)),
        ("offsets", lambda values: values * 2),
        ("offsets", lambda values: values + 1),
        ("offsets", lambda values: values.flip(0)),
        ("norms", lambda values: -values),
        ("directions", lambda values: values * 3),
        ("directions", lambda values: values.double()),
        ("directions", lambda values: values[:-1]),
        ("directions", lambda values: values.flatten()),
    ],
)
def test_indices_and_shapes_are_in_range(copied, column, change):
    change_tensors(copied, SHARD, lambda tensors: tensors.update({column: change(tensors[column])}))
    with pytest.raises(ValueError, match=rf"{copied / SHARD} is damaged: "):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)


def test_gradients_of_another_width_are_named(copied):
    change_tensors(copied, SHARD, lambda tensors: tensors.update(directions=tensors["directions"][:, :5]))
    with pytest.raises(ValueError, match=rf"{copied / STEP}/words holds gradients of \(5,\) numbers, but .* \(8,\)"):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)


def test_second_moments_of_another_layer_are_named(copied):
    name = f"{STEP}/second-moments-linear-0.safetensors"
    tensors = load_file(copied / name)
    checkpoint = Trace(copied).checkpoints[0]
    eps = {"eps": repr(checkpoint.second_moments(checkpoint.sites[1]).eps)}
    save_file({"values": tensors["values"][:, :-1].contiguous()}, copied / name, eps)
    rehash(copied)
    with pytest.raises(ValueError, match=rf"{copied / name} is damaged: \(3, 8\) second moments are not those"):
        quiet().influence(loader(test_texts()), Toy(), trace=copied, method=TracInLast(precondition="adam"))


@pytest.mark.parametrize("change", ["name", "shape", "tied"])
def test_weights_of_another_model_are_named(copied, change):
    name = f"{STEP}/weights.safetensors"
    tensors = load_file(copied / name)
    if change == "name":
        tensors["header"] = tensors.pop("head.weight")
    elif change == "shape":
        tensors["head.weight"] = tensors["head.weight"][:2].contiguous()
    save_file(tensors, copied / name, {"tied.weight": "nowhere"} if change == "tied" else None)
    rehash(copied)
    with pytest.raises(ValueError, match=rf"{copied / name} is damaged: "):
        quiet().influence(loader(test_texts()), Toy(), trace=copied)


def test_what_would_be_refused_is_not_written(tmp_path):
    vocabulary = schemas.VocabularyFile(words={"x": "y"})
    with pytest.raises(ValueError, match=r"vocabulary\.json was not written: Expected `str` matching regex"):
        schemas.write(tmp_path / "vocabulary.json", vocabulary)
    assert not list(tmp_path.iterdir())


def test_a_lone_half_of_a_character_in_a_word_can_be_stored(copied):
    trace = Trace(copied)
    trace.add_words({39: "a\ud800b", 38: "\ud83d\ude00"})
    assert {token: Trace(copied).vocabulary[token] for token in (38, 39)} == {38: "😀", 39: "a�b"}
    assert json.loads((copied / "vocabulary.json").read_text())["words"]["39"] == "a�b"
