"""Two processes (gloo, on the CPU) against one."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import pytorch_lightning as pl
import torch
from launched import run
from processes_apart import Normed
from toy import N_TRAIN, Toy, fitted, loader, quiet, site_of, test_texts, texts
from two_processes import CACHES
from two_processes import METHODS as ASKED
from variants import Reproducible

from lightning_tracin import Trace, TracInCallback, TracInWE
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.parallel import processes
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.storage.runs import Runs

METHODS = ("tracin-we", "tracin-last")


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks):
    """The folder, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    fitted(folder / "alone")
    done = forks.run_two(folder, script="two_processes.py")
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
def test_a_query_draws_no_random_number(two, cache):
    assert all(bool(found[f"{cache} draws nothing"]) for found in two[1:])


def test_several_loaders_and_a_data_set_among_them(two):
    for found in two[1:]:
        alone = found["checkpoint tracin-we"]
        torch.testing.assert_close(found["in two loaders"], torch.cat([alone, alone]), rtol=1e-5, atol=1e-9)
        assert found["whose"].tolist() == [0] * len(alone) + [1] * len(alone)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", ASKED, ids=str)
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
            shards = own.gradients(site_of(own, method))
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


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The folder, and what each of two processes found that differ in one thing or another."""
    folder = tmp_path_factory.mktemp("apart")
    fitted(folder / "empty", cache="on_demand")
    done = run(folder, "2", script="processes_apart.py")
    assert done.returncode == 0, done.stderr
    return folder, *(json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))


def scores_in(trace, kind, data=None, **options):
    return quiet().influence(loader(test_texts() if data is None else data), kind(), trace=trace, **options).scores


@pytest.mark.parametrize("cache", CACHES)
def test_what_no_process_has_drawn_is_no_training_example(apart, cache):
    """One of two processes has no example to read at all; the scores are those of one process, which fills them in."""
    folder, *found = apart
    path = shutil.copytree(folder / "held back, not filled", folder / f"filled for {cache}")
    alone = quiet().influence(loader(test_texts()), Toy(), trace=path, train_dataloaders=loader())
    assert alone.undrawn.tolist() == [3, 8, *range(10, N_TRAIN)]
    for of_process in found:
        scores, proponents = of_process[f"held back {cache}"]
        if cache == "training":  # of the weights of the moment
            assert (torch.tensor(scores) != 0).any(0).tolist() == (alone.scores != 0).any(0).tolist()
        else:
            torch.testing.assert_close(torch.tensor(scores), alone.scores, rtol=1e-5, atol=1e-9)
            assert proponents == alone.proponents(8).indices.tolist()
        assert {index for row in proponents for index in row} == {0, 1, 2, 4, 5, 6, 7, 9}


def test_a_query_that_starts_the_processes_divides_the_missing_gradients(apart):
    folder, *found = apart
    alone = quiet().self_influence(trace=folder / "empty")
    for each in found:
        torch.testing.assert_close(torch.tensor(each["filled first"]), alone, rtol=1e-5, atol=1e-9)


def test_processes_that_shuffle_the_test_examples_differently_leave_none_out(apart):
    folder, *found = apart
    alone = scores_in(folder / "trace", Toy, texts(7, seed=1))
    for indices, scores in (each["shuffled"] for each in found):
        assert indices == list(range(7))
        torch.testing.assert_close(torch.tensor(scores), alone, rtol=1e-5, atol=1e-9)


def test_a_single_test_example_for_two_processes(apart):
    folder, *found = apart
    alone = scores_in(folder / "trace", Toy, texts(7, seed=1))[3:4]
    for each in found:
        torch.testing.assert_close(torch.tensor(each["a single one"]), alone.topk(2).values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("broken", r"ValueError: The loss of training example 1\d is NaN or infinite"),
        ("broken in training", "ValueError: The gradient of training example .* became NaN or infinite"),
        ("broken test", "ValueError: The loss of test example .* is NaN or infinite"),
        ("damaged", "ValueError: .*texts.*safetensors is damaged"),
        ("full", "OSError: .*00001.safetensors could not be written"),
        ("refused", "FileExistsError: .* holds the trace of another fit"),
        ("reloaded", "ValueError: The training loader was made anew for epoch 1, and its data set has other examples"),
        ("locked", "BlockingIOError: Another fit or query writes into the trace"),
        ("different data", "ValueError: Processes 0 and 1 have different training sets"),
        ("reordered test", "ValueError: The collate function of the test loader, by_first_word, puts"),
        ("different test", "ValueError: Processes 0 and 1 have different test examples"),
    ],
)
def test_an_error_in_one_process_is_raised_in_both(apart, what, message):
    _, *found = apart
    for each in found:
        assert re.match(message, each[what])


@pytest.mark.parametrize(("fit", "steps"), [("full", []), ("broken in training", [3])])
def test_after_an_error_only_complete_checkpoints_are_there(apart, fit, steps):
    folder, *_ = apart
    assert [each.step for each in Trace(folder / fit).checkpoints] == steps
    assert not list((folder / fit).rglob("*.partial"))


def test_both_processes_compute_at_the_statistics_that_are_recorded(apart, tmp_path):
    folder, *_ = apart
    shutil.copytree(folder / "normed", tmp_path / "normed")
    for checkpoint in Trace(tmp_path / "normed").checkpoints:
        shutil.rmtree(checkpoint.path / "words")
    again = scores_in(tmp_path / "normed", Normed, train_dataloaders=loader())
    torch.testing.assert_close(scores_in(folder / "normed", Normed), again, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_training_are_those_of_the_examples(apart, method):
    """With accumulated batches, and checkpoints in the middle of epochs; the weights hardly move."""
    folder, *_ = apart
    training, checkpoint = (Trace(folder / f"still {cache}").checkpoints for cache in ("training", "checkpoint"))
    assert [each.step for each in training] == [each.step for each in checkpoint] == [3, 6, 9, 12]
    n_came = 0
    for pair in zip(training, checkpoint, strict=True):
        found, expected = (
            torch.cat([shards.read(shard).example_norms() for shard in range(len(shards))])
            for shards in (each.gradients(site_of(each, method)) for each in pair)
        )
        came = found > 0
        n_came += int(came.sum())
        torch.testing.assert_close(found[came], expected[came], rtol=1e-4, atol=0)
    assert n_came > N_TRAIN


def test_a_resumed_fit_of_two_continues_its_trace(apart):
    folder, *_ = apart
    whole, resumed = (Trace(folder / name).checkpoints for name in ("straight", "resumed"))
    assert [each.step for each in resumed] == [each.step for each in whole] == [3, 6]
    assert [each.learning_rate for each in resumed] == [each.learning_rate for each in whole]
    scores = [scores_in(folder / name, Reproducible) for name in ("straight", "resumed")]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-9)


def test_the_folder_beside_the_log_is_the_same_for_all(apart):
    folder, *found = apart
    assert [each["logged"] for each in found] == [str(folder / "logs" / "lightning_logs" / "version_0" / "trace")] * 2
    assert len(Trace(found[0]["logged"]).checkpoints) == 2


@pytest.mark.slow
def test_three_processes_of_torchrun_with_two_examples(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=3", "--standalone")
    done = run(tmp_path, "3", script="processes_apart.py", launcher=launcher)
    assert done.returncode == 0, done.stderr
    few = texts(2, seed=1)
    alone = quiet().influence(loader(few), Toy(), trace=tmp_path / "few", method="tracin-last").scores
    for rank in range(3):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(found["few"]), alone, rtol=1e-5, atol=1e-9)


def test_of_an_example_that_came_to_two_processes_the_later_record_counts(tmp_path):
    """The second process has an older record of example 0 than the first."""
    blocks = [
        WordGradients(1, torch.tensor([0]), torch.tensor([norm]), torch.ones(1, 1), tokens=torch.tensor([5]))
        for norm in (2.0, 1.0)
    ]
    runs = [Runs(tmp_path / str(rank), 1, dtype="float32") for rank in range(2)]
    for when, each, block in zip((7, 3), runs, blocks, strict=True):
        each.add(torch.tensor([0]), {"words": block}, when)
    gathered = []
    for each in runs:

        class Both(Processes):
            def gather(self, value):
                gathered.append(value)
                return gathered

        arranged = list(each.arranged("words", 1, Both(0, 2)))
    assert arranged[0].norms.tolist() == [2.0]


def test_a_folder_that_another_process_does_not_see(monkeypatch):
    monkeypatch.setattr(processes, "_VISIBILITY_SECONDS", 0.2)
    with pytest.raises(FileNotFoundError, match="on a file system that all nodes share"):
        processes.wait_until_visible(lambda: False, "The first process has begun a trace")


@pytest.mark.parametrize(
    ("fault", "message"), [pytest.param("nan", "is NaN or infinite", marks=pytest.mark.slow), ("killed", "")]
)
def test_when_one_process_fails_all_end_and_the_checkpoint_is_not_there(tmp_path, fault, message):
    done = run(tmp_path, fault)
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
    assert fit.self_influence(trace=tmp_path / "trace").min() > 0  # needs no pass through the model


def test_training_goes_on_in_all_when_one_cannot_write(apart):
    """The disk of the second process is full: both stop recording at the first checkpoint, and train as without us."""
    folder, *found = apart
    assert [each["going on"] for each in found] == [True, True]
    trace = Trace(folder / "going on")
    assert not trace.checkpoints
    assert "00001.safetensors could not be written" in trace.incomplete
