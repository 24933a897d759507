"""K-FAC's components that two processes store together, whole and with FSDP, against those of one."""

from __future__ import annotations

import json

import pytest
import torch
from fsdp_processes import LENGTH, UNEVEN
from rank_processes import FITS, METHOD, TESTS, Reading
from toy import loader, quiet, texts

from lightning_tracin import Trace
from lightning_tracin.storage.verification import verify


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks):
    """The folder of the traces, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    done = forks.run_two(folder, script="rank_processes.py")
    assert done.returncode == 0, done.stderr
    return folder, *(json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize("name", FITS)
def test_one_process_finds_what_two_found(two, name):
    folder, first, second = two
    assert first[name] == second[name]
    assert Trace(folder / name).sites[1].rank == (4, 3)
    assert not any(problem for _, problem in verify(Trace(folder / name)))
    data = loader(texts(TESTS, seed=1, length=LENGTH))
    alone = quiet().influence(data, Reading(), trace=folder / name, method=METHOD)
    torch.testing.assert_close(torch.tensor(first[name]), alone.scores, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", FITS)
def test_one_process_stores_what_two_stored(two, name, tmp_path):
    """At the checkpoints of the fit of two; components may be turned round, products are the same."""
    folder, first, _ = two
    train = loader(texts(UNEVEN, length=LENGTH))
    source = Trace(folder / name)
    Trace.from_checkpoints(tmp_path / "trace", source, Reading(), train, methods=("tracin-we", "hidden"), rank=(4, 3))
    asked = {"trace": tmp_path / "trace", "train_dataloaders": train, "method": METHOD}
    alone = quiet().influence(loader(texts(TESTS, seed=1, length=LENGTH)), Reading(), **asked).scores
    drawn = torch.tensor([index for index in range(UNEVEN) if index not in source.undrawn.tolist()])
    torch.testing.assert_close(torch.tensor(first[name])[:, drawn], alone[:, drawn], rtol=2e-2, atol=2e-3)
