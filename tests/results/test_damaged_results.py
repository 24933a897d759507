"""A saved result that has changed: an error that names its file, never another number."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stored_files import flipped, truncated
from toy import loader, test_texts

from lightning_tracin import InfluenceResult
from lightning_tracin.storage.files import hash_of_tensors

HEADER, CHECKSUM = "lightning_tracin.result", "lightning_tracin.checksum"


@pytest.fixture(params=[None, 3], ids=["all scores", "k=3"])
def file(request, toy, tmp_path):
    """The file of a result whose trace is not where it was, so that nothing but the file is read."""
    result = toy.influence(loader(test_texts()), k=request.param)
    result.save(tmp_path / "saved" / "result.safetensors")
    path = tmp_path / "result.safetensors"
    tensors, metadata = content_of(tmp_path / "saved" / "result.safetensors")
    header = {**json.loads(metadata[HEADER]), "trace": None, "trace_relative": None}
    return rewritten(path, tensors, json.dumps(header))


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
