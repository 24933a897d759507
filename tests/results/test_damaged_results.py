"""A saved result that has changed: an error that names its file, never another number."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stored_files import flipped, truncated
from toy import loader, test_texts

from lightning_tracin import InfluenceResult
from lightning_tracin.storage.files import hash_of_tensors

HEADER, CHECKSUM = "lightning_tracin.result", "lightning_tracin.checksum"


@pytest.fixture(scope="module", params=[None, 3], ids=["all scores", "k=3"])
def saved(request, toy, tmp_path_factory):
    """The file of a result whose trace is not where it was, so that nothing but the file is read."""
    path = tmp_path_factory.mktemp("saved") / "result.safetensors"
    toy.influence(loader(test_texts()), k=request.param).save(path)
    tensors, metadata = content_of(path)
    header = {**json.loads(metadata[HEADER]), "trace": None, "trace_relative": None}
    return rewritten(path, tensors, json.dumps(header))


@pytest.fixture
def file(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copy(saved, tmp_path / "result.safetensors")


def content_of(path):
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def rewritten(path, tensors, text):
    save_file(tensors, path, metadata={HEADER: text, CHECKSUM: hash_of_tensors(tensors, text)})
    return path


def test_a_bit_that_flips_is_an_error(file):
    """Most bits are of tensors, so as many are tried in the header."""
    intact = file.read_bytes()
    n_header = 8 + int.from_bytes(intact[:8], "little")
    draw = random.Random(0)
    bits = [*draw.sample(range(8 * n_header), 200), *draw.sample(range(8 * n_header, 8 * len(intact)), 150)]
    for bit in [*range(64), *bits]:
        flipped(file, bit)
        with pytest.raises(ValueError, match=f"{file}.* is damaged: "):  # noqa: PT012
            InfluenceResult.load(file)
            pytest.fail(f"bit {bit} of {n_header} bytes of header and {len(intact) - n_header} of tensors")
        file.write_bytes(intact)
    InfluenceResult.load(file)


def test_another_kind_of_file(tmp_path):
    path = tmp_path / "review.csv"
    path.write_text("train_index,text,label\n", encoding="utf-8")
    with pytest.raises(ValueError, match="it does not begin as a safetensors file does"):
        InfluenceResult.load(path)


@pytest.mark.parametrize("left", [0, 7, 8, 300, -300, -1])
def test_a_file_that_is_cut_short(file, left):
    truncated(file, left if left >= 0 else file.stat().st_size + left)
    with pytest.raises(ValueError, match=f"{file} holds no InfluenceResult, or is damaged"):
        InfluenceResult.load(file)


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "name", "order of examples", "one less"])
def test_tensors_that_were_changed(file, change):
    tensors, metadata = content_of(file)
    indices = tensors["test_indices"]
    if change == "one less":
        del tensors["texts.labels"]
    elif change == "name":
        tensors["test_indexes"] = tensors.pop("test_indices")
    else:
        tensors["test_indices"] = {
            "value": indices + 1,
            "shape": indices[:, None],
            "dtype": indices.view(torch.float64),
            "order of examples": indices.flip(0),
        }[change]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=f"{file} is damaged: it has the checksum .* but .* was written. Restore"):
        InfluenceResult.load(file)


def test_a_header_that_was_changed(file):
    tensors, metadata = content_of(file)
    save_file(tensors, file, metadata={**metadata, HEADER: metadata[HEADER].replace('"n_train": 20', '"n_train": 21')})
    with pytest.raises(ValueError, match=f"{file} is damaged: it has the checksum"):
        InfluenceResult.load(file)


@pytest.mark.parametrize("text", ["{", "3", "[]", "null", "{}", '{"version": "2"}'])
def test_a_header_that_is_none(file, text):
    tensors, _ = content_of(file)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        InfluenceResult.load(rewritten(file, tensors, text))


def test_a_result_without_a_checksum(file):
    tensors, metadata = content_of(file)
    save_file(tensors, file, metadata={HEADER: metadata[HEADER]})
    with pytest.raises(ValueError, match=f"{file} is damaged: its metadata has no {CHECKSUM}"):
        InfluenceResult.load(file)
    save_file(tensors, file, metadata={HEADER: metadata[HEADER].replace('"version": 2', '"version": 1')})
    with pytest.raises(ValueError, match=f"{file} is of format version 1, .* Ask trainer.influence again"):
        InfluenceResult.load(file)


@pytest.mark.parametrize(("target", "names"), [("tech", []), ("tech", ["tech"]), ("label", ["0"] * 6)])
def test_targets_that_are_not_named_for_each_test_example(file, target, names):
    tensors, metadata = content_of(file)
    header = {**json.loads(metadata[HEADER]), "target": target, "target_names": names}
    with pytest.raises(ValueError, match=f"{file} is damaged: it names the targets"):
        InfluenceResult.load(rewritten(file, tensors, json.dumps(header)))


@pytest.mark.parametrize(
    ("target", "classes"),
    [("label", [1]), ("prediction", [1]), ("a", [1, 1]), ("a", [-1]), ("a", [0, 1, 2]), ("a", "1")],
)
def test_classes_that_are_not_those_of_a_target(file, target, classes):
    tensors, metadata = content_of(file)
    named = {"target": target, "target_names": [] if target == "label" else ["a"] * 6, "target_classes": classes}
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        InfluenceResult.load(rewritten(file, tensors, json.dumps({**json.loads(metadata[HEADER]), **named})))


def test_a_result_of_before_there_were_targets(file):
    tensors, metadata = content_of(file)
    header = {name: each for name, each in json.loads(metadata[HEADER]).items() if not name.startswith("target")}
    assert InfluenceResult.load(rewritten(file, tensors, json.dumps(header))).target == "label"


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        InfluenceResult.load(tmp_path / "none.safetensors")


def test_the_checksum_does_not_depend_on_the_order_or_the_place_of_tensors():
    values = torch.arange(6.0).reshape(2, 3)
    written = {"a": values, "b": torch.zeros(()), "c": torch.ones(0, 4, dtype=torch.int8), "d": torch.tensor([True])}
    again = {name: written[name].clone() for name in "dcba"} | {"a": values.T.contiguous().T}
    assert hash_of_tensors(again, "x") == hash_of_tensors(written, "x")
    assert hash_of_tensors(written) != hash_of_tensors(written, "x")
    assert hash_of_tensors({**written, "a": values.T}) != hash_of_tensors(written)
    assert hash_of_tensors({**written, "b": torch.zeros(1)}) != hash_of_tensors(written)


def forged(file, change_header=None, change_tensors=None):
    """The file with other content, and a checksum that fits."""
    tensors, metadata = content_of(file)
    header = json.loads(metadata[HEADER])
    if change_header is not None:
        change_header(header)
    if change_tensors is not None:
        change_tensors(tensors)
    return rewritten(file, tensors, json.dumps(header))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_train", 10**9),
        ("n_train", 21.0),
        ("n_train", True),
        ("n_train", 1),
        ("gradients", []),
        ("gradients", [[10**8, 10**8]]),
        ("gradients", [[6]]),
        ("gradients", [["6", 6]]),
        ("words_of_ids", {"../x": "word"}),
        ("words_of_ids", {"1": None}),
        ("label_names", []),
        ("checkpoint_ids", []),
        ("checkpoint_ids", ["a", "a"]),
        ("trace", 3),
        ("method", {"method": "TracInWE", "top_words": 2**70}),
        ("method", {"method": "TracInWE", "exclude_tokens": [2**64]}),
        ("method", {"method": "TracInWE", "exclude_tokens": "abc"}),
        ("method", {"method": "TracInWE", "exclude_tokens": {"asked": ["the"], "ids": None}}),
        ("method", {"method": "TracInWE", "normalize": "other"}),
        ("method", {"method": "TracInWE", "more": 1}),
        ("method", {"method": "TracInLast"}),
        ("method", {"method": "TracInLayer"}),
        ("method", {"method": ["TracInWE"]}),
        ("method", {"method": "TracInSum", "parts": "ab"}),
        (
            "method",
            {"method": "TracInSum", "parts": [{"method": "TracInWE"}, {"method": "TracInLast"}], "mix": ["1", 2]},
        ),
        (
            "method",
            {"method": "TracInSum", "parts": [{"method": "TracInWE"}, {"method": "TracInLast"}], "scales": [0, 2]},
        ),
        ("method", {"method": "TracInWE", "weights": "losses"}),
        ("method", []),
        ("more", 1),
    ],
)
def test_a_header_that_was_forged(file, key, value):
    forged(file, lambda header: header.update({key: value}))
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        InfluenceResult.load(file)


def test_parts_of_parts_are_no_method(file):
    method = {"method": "TracInWE"}
    for _ in range(400):
        method = {"method": "TracInSum", "parts": [method, {"method": "TracInLast"}]}
    forged(file, lambda header: header.update(method=method))
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        InfluenceResult.load(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 100, -1, 2**40])
def test_tensors_that_were_forged(file, value):
    """Numbers that no result has: most are refused, and none comes out again."""
    intact = file.read_bytes()
    names = sorted(content_of(file)[0])
    n_refused = 0
    for name in names:

        def change(tensors, name=name):
            flat = tensors[name].view(-1)
            flat[len(flat) // 2] = value if flat.is_floating_point() or abs(value) < 2**50 else 0

        try:
            forged(file, change_tensors=change)
        except (ValueError, OverflowError, RuntimeError):  # NaN as an integer
            continue
        try:
            result = InfluenceResult.load(file)
            assert result.proponents(3).values.isfinite().all()
            assert str(result)
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017 (or nothing is raised)
            n_refused += 1
        file.write_bytes(intact)
    assert n_refused >= 3


@pytest.mark.parametrize("place", ["a\x00b", "x" * 5000, "/dev/zero", "\U0001f600/../..", "/proc/self/fd"])
def test_a_trace_that_cannot_be_there_is_not(file, place):
    forged(file, lambda header: header.update(trace=place, trace_relative=place))
    assert InfluenceResult.load(file).trace is None


def test_a_result_of_another_number_of_examples_than_its_trace(toy, tmp_path):
    path = toy.influence(loader(test_texts()), k=3).save(tmp_path / "result.safetensors", k=0)
    forged(path, lambda header: header.update(n_train=21))
    with pytest.raises(ValueError, match=f"{path} is damaged: it has 21 training examples, but the trace in .* has 20"):
        InfluenceResult.load(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "result.safetensors"
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    of_a_file = f"{path} is damaged: it is no file"
    message = f"A result is one file, but {path} is a folder" if kind == "folder" else of_a_file
    with pytest.raises(ValueError, match=message):
        InfluenceResult.load(path)


@pytest.mark.parametrize("mark", ["▁", "Ġ", "##", "</w>", "@@"])
def test_words_without_signs_are_read_with_any_marks(toy, mark):
    result = toy.influence(loader(test_texts()))
    result.words_of_ids = {token: ["", f"{mark}a", f"a{mark}"][token % 3] for token in range(40)}
    assert str(result)
    total = sum(term for _, term in result.words(0, 3))
    assert total == pytest.approx(float(result.scores[0, 3]), rel=1e-4, abs=1e-9)
