"""What is explained of test examples that two processes divide among themselves, whole and with FSDP, against one."""

from __future__ import annotations

import json

import pytest
import torch
from target_processes import FITS, LENGTH, TARGETS, TESTS
from toy import loader, quiet, texts


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks):
    """The folder of the traces, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = forks.run_two(folder, script="target_processes.py")
    assert done.returncode == 0, done.stderr
    return folder, *(json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("target", TARGETS)
def test_one_process_finds_what_two_found(two, name, target):
    folder, first, second = two
    data = loader(texts(TESTS, seed=1, length=LENGTH))
    alone = quiet().influence(data, FITS[name][0](), trace=folder / name, target=TARGETS[target])
    for labelled in ("", " unlabelled"):
        scores, names, classes = first[f"{name} {target}{labelled}"]
        assert first[f"{name} {target}{labelled}"] == second[f"{name} {target}{labelled}"]
        torch.testing.assert_close(torch.tensor(scores), alone.scores, rtol=1e-5, atol=1e-9)
        assert names == alone.target_names
        assert classes == alone.target_classes


@pytest.mark.parametrize("name", FITS)
def test_a_target_that_does_not_fit_is_an_error_in_both(two, name):
    for found in two[1:]:
        assert "there is no class 3" in found[f"{name} unknown"]
        assert 'target="prediction" explains' in found[f"{name} without labels"]
