"""Two processes (gloo, on the CPU) against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from toy import N_TRAIN, Toy, fitted, loader, quiet, test_texts
from two_processes import CACHES

from lightning_tracin import Trace, TracInCallback, TracInWE
from lightning_tracin.processes import require_whole_module

METHODS = ("tracin-we", "tracin-last")


def run(folder, *arguments, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    for name in ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    script = Path(__file__).with_name("two_processes.py")
    return subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    fitted(folder / "alone")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, *(torch.load(folder / f"process-{rank}.pt", weights_only=True) for rank in (0, 1))


def test_both_processes_have_the_same_results(two):
    _, first, second = two
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("cache", CACHES)
def test_training_is_what_it_is_without_the_callback(two, cache):
    _, found, _ = two
    for name in Toy().state_dict():
        assert torch.equal(found[f"{cache} {name}"], found[f"None {name}"])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", METHODS)
def test_one_process_finds_in_the_trace_of_two_what_they_found(two, cache, method):
    folder, found, _ = two
    alone = {"model": Toy(), "trace": folder / cache, "method": method}
    result = quiet().influence(loader(test_texts()), **alone)
    assert result.scores.shape[1] == N_TRAIN
    torch.testing.assert_close(found[f"{cache} {method}"], result.scores, rtol=1e-5, atol=1e-9)
    own = quiet().self_influence(trace=folder / cache, method=method)
    torch.testing.assert_close(found[f"{cache} {method} own"], own, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found[f"{cache} {method} proponents"], result.proponents(3).values, rtol=1e-5, atol=1e-9)
    assert torch.equal(found[f"{cache} {method} opponents"], result.opponents(3).indices)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_stored_by_two_are_those_that_one_computes(two, tmp_path, method):
    """Filled in on demand by a single process, at the checkpoints of the fit of two."""
    folder, found, _ = two
    for checkpoint in Trace(folder / "checkpoint").checkpoints:
        stored = {}
        for cache in ("checkpoint", "on_demand"):
            own = next(each for each in Trace(folder / cache).checkpoints if each.step == checkpoint.step)
            shards = own.gradients(method)
            assert len(shards) == 2
            stored[cache] = torch.cat([shards.read(shard).example_norms() for shard in range(2)])
        torch.testing.assert_close(stored["checkpoint"], stored["on_demand"], rtol=1e-5, atol=1e-9)
    assert found[f"checkpoint {method}"].abs().sum() > 0
    again = Trace(folder / "checkpoint")
    callback = TracInCallback(tmp_path / "trace", dtype="float32", cache="on_demand")
    pl.seed_everything(0, verbose=False)
    quiet(callbacks=[callback]).fit(Toy(), loader())
    scores = (
        quiet().influence(loader(test_texts()), Toy(), trace=again, train_dataloaders=loader(), method=method).scores
    )
    torch.testing.assert_close(found[f"checkpoint {method}"], scores, rtol=1e-5, atol=1e-9)


def test_two_processes_find_in_the_trace_of_one_what_it_finds(two):
    folder, found, _ = two
    alone = quiet().influence(loader(test_texts()), Toy(), trace=folder / "alone").scores
    torch.testing.assert_close(found["of one process"], alone, rtol=1e-5, atol=1e-9)


def test_words_are_those_of_one_process(two):
    folder, found, _ = two
    method = TracInWE(normalize="cosine")
    alone = quiet().influence(loader(test_texts()), Toy(), trace=folder / "checkpoint", method=method)
    expected = [score for _, score in alone.words(1, N_TRAIN - 1)]
    torch.testing.assert_close(found["words"], torch.tensor(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("fault", "message"), [("nan", "is NaN or infinite"), ("killed", "")])
def test_when_one_process_fails_all_end_and_the_checkpoint_is_not_there(tmp_path, fault, message):
    done = run(tmp_path, fault, timeout=120)
    assert done.returncode != 0
    assert message in done.stderr
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [3]
    scores = quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores
    assert scores.abs().sum() > 0


def test_spawned_processes_leave_a_trace_but_cannot_be_asked(tmp_path):
    fit = quiet(callbacks=[TracInCallback(tmp_path / "trace")], strategy="ddp_fork", devices=2)
    fit.fit(Toy(), loader())
    assert len(Trace(tmp_path / "trace").checkpoints) == 2
    with pytest.raises(ValueError, match=r'spawns or forks its processes.*strategy="ddp"'):
        fit.influence(loader(test_texts()), Toy(), trace=tmp_path / "trace")
    assert quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores.abs().sum() > 0


def test_strategies_that_spread_the_weights_are_refused():
    class Sharded:  # Lightning builds no such trainer without a GPU
        world_size = 2
        strategy = object.__new__(pl.strategies.FSDPStrategy)

    with pytest.raises(ValueError, match="strategy is FSDPStrategy, which spreads the weights"):
        require_whole_module(Sharded())
