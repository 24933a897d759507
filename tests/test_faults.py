"""Files that were damaged after they were written: never a wrong score."""

from __future__ import annotations

import shutil

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
@pytest.mark.parametrize(
    "name", ["tracin-we/00000.safetensors", "weights.safetensors", "second-moments-tracin-we.safetensors"]
)
def test_a_damaged_file_is_named(tmp_path, trace, name, damage):
    shutil.copytree(trace, tmp_path / "trace")
    damage(Trace(tmp_path / "trace").checkpoints[1].path / name)
    method = TracInWE(precondition="adam")
    with pytest.raises(ValueError, match=f"{name.split('/')[-1]} is damaged"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace", method=method)


def test_damaged_gradients_can_be_removed_and_computed_again(tmp_path):
    fit = fitted(tmp_path / "trace")
    expected = fit.influence(loader(test_texts())).scores
    folder = Trace(tmp_path / "trace").checkpoints[0].path / "tracin-we"
    flip_a_bit(folder / "00000.safetensors")
    with pytest.raises(ValueError, match="it is enough to remove its folder"):
        fit.influence(loader(test_texts()))
    shutil.rmtree(folder)
    torch.testing.assert_close(fit.influence(loader(test_texts())).scores, expected, rtol=1e-4, atol=1e-9)
