"""Fits that spread the weights over two processes (FSDP, gloo, on the CPU) against brute force, DDP and one process."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from brute_force import BruteForce, dense_gradients, relative_error, untie
from fsdp_processes import (
    AT_LAYERS,
    CACHES,
    FITS,
    HALF,
    LENGTH,
    SELDOM,
    TESTS,
    UNEVEN,
    Normed,
    Plain,
    Recomputing,
    Reproducible,
    Tied,
)
from safetensors import safe_open
from torch.utils.data import DistributedSampler
from toy import RATE, Toy, loader, mean_rate, quiet, site_of, texts

from lightning_tracin import Trace, TracInWE
from lightning_tracin.bridge.strategy import require_strategy
from lightning_tracin.parallel.fsdp import gathered_tensor

METHODS = ("tracin-we", "tracin-last")
LAYERS = {"tracin-we": "embedding", "tracin-last": "head"}
TRAIN = texts(UNEVEN, length=LENGTH)
TEST = texts(TESTS, seed=1, length=LENGTH)
LEARNING = ("whole", "wrapped", "gradients", "hybrid", "recomputed", "wrapping")  # each a way to spread a Toy
ROUNDED = 1e-2  # relative error of what is computed in bfloat16, of 8 bits


@pytest.fixture(scope="module")
def fits(request, tmp_path_factory, forks):
    """The folder of the traces, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("fsdp")
    here = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    slow = any(item.get_closest_marker("slow") for item in here)
    done = forks.run_two(folder, *(["all"] if slow else []), script="fsdp_processes.py")
    assert done.returncode == 0, done.stderr
    return folder, *(json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))


def each(names):
    """A test of each of these fits, slow of those that are near another."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in names]
    return pytest.mark.parametrize("name", marked)


def brute_force(trace, kind, layer, rates):
    """One example at a time, at the recorded weights; at each checkpoint those count that its epoch has drawn."""

    def gradients(checkpoint, examples):
        module = kind()
        module.load_state_dict(checkpoint.weights())
        if kind is Tied:
            untie(module, module.embedding)
        loss = (lambda batch: module.training_step(batch, 0)) if kind is Plain else module.influence_loss
        if kind is Plain:
            module.log = lambda *_: None
        singles = loader(examples, batch_size=1)
        return dense_gradients(module, getattr(module, layer), singles, lambda batch: loss(batch).sum())

    test, train = ([gradients(each, side) for each in Trace(trace).checkpoints] for side in (TEST, TRAIN))
    for epoch, of_epoch in enumerate(train):
        drawn = drawn_in(epoch)
        of_epoch[[index for index in range(UNEVEN) if index not in drawn]] = 0
    return BruteForce(rates, test, train)


def drawn_in(epoch):
    """The examples of each process's whole batches, by the sampler that Lightning gives both."""
    found = set()
    for rank in (0, 1):
        sampler = DistributedSampler(TRAIN, num_replicas=2, rank=rank, shuffle=True, seed=0)
        sampler.set_epoch(epoch)
        found |= set(list(sampler)[:8])
    return found


def scores_in(trace, kind=Toy, **options):
    return quiet().influence(loader(TEST), kind(), trace=trace, **options).scores


@each(FITS | HALF)
def test_training_is_what_it_is_without_the_callback(fits, name):
    _, *found = fits
    assert all(each[f"{name} untouched"] for each in found)


@each(["recomputing", "recomputing training"])
def test_frozen_weights_are_stored_once(fits, name):
    folder, *_ = fits
    trace = Trace(folder / name)
    (shared,) = trace.path.glob("frozen-*.safetensors")
    assert [list(each.shared) for each in trace.checkpoints] == [[shared.name]] * 2
    assert trace.checkpoints[0].weights().keys() == Toy().state_dict().keys()
    with safe_open(trace.checkpoints[0].path / "weights.safetensors", framework="pt") as file:
        assert set(file.keys()) == Toy().state_dict().keys() - {"embedding.weight"}


def test_gradients_are_there_after_a_checkpoint_as_without_it(fits):
    _, *found = fits
    for each in found:
        assert each["gradients seen"] == each["gradients seen without"]
        assert max(each["gradients seen"]) > 0


@pytest.mark.parametrize("method", METHODS)
@each([*LEARNING, "plain", "tied", "on_demand", "recomputing", "bfloat16", "mixed", "mixed plain", "true"])
def test_one_process_finds_in_the_trace_what_brute_force_finds_at_its_weights(fits, name, method):
    folder, *_ = fits
    kind = Toy if name in LEARNING else (FITS | HALF)[name][0]
    rates = [RATE, RATE] if kind in (Plain, Tied) else [mean_rate(0, 2), mean_rate(2, 4)]
    scores = scores_in(folder / name, kind, method=method)
    expected = brute_force(folder / name, kind, LAYERS[method], rates).scores()
    assert scores.shape == (5, UNEVEN)
    assert relative_error(scores, expected) < (ROUNDED if name in HALF else 1e-5)


@each([*LEARNING, "on_demand", "training"])
def test_what_is_recorded_is_what_ddp_learns(fits, name):
    """Weights, Adam's second moments, rates and the names of the trained parameters."""
    folder, *_ = fits
    trace, whole = Trace(folder / name), Trace(folder / "ddp checkpoint")
    assert trace.sites == whole.sites
    assert {site.name: site.layer for site in trace.sites} == LAYERS
    assert len(trace.checkpoints) == len(whole.checkpoints) == 2
    for found, expected in zip(trace.checkpoints, whole.checkpoints, strict=True):
        assert (found.step, found.epoch, found.groups, found.steps) == (
            expected.step,
            expected.epoch,
            expected.groups,
            expected.steps,
        )
        weights, of_ddp = found.weights(), expected.weights()
        assert weights.keys() == of_ddp.keys()
        for parameter, value in of_ddp.items():
            torch.testing.assert_close(weights[parameter], value, rtol=1e-4, atol=1e-6)
        for method in METHODS:
            moments, of_whole = (each.second_moments(site_of(each, method)) for each in (found, expected))
            torch.testing.assert_close(moments.values, of_whole.values, rtol=1e-4, atol=1e-12)
            assert moments.eps == of_whole.eps
            assert (moments.rows is None) == (of_whole.rows is None)
            assert moments.rows is None or torch.equal(moments.rows, of_whole.rows)


def assert_same_scores(found, expected):
    """Up to what CPUs round, each adding in an order of its own: scores are sums of terms that may cancel."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", AT_LAYERS)
def test_any_layer_is_recorded_and_scored(fits, cache, name):
    folder, *found = fits
    alone = scores_in(folder / f"layers {cache}", method=AT_LAYERS[name])
    for each in found:
        assert_same_scores(torch.tensor(each[f"layers {cache} {name}"]), alone)
    if (cache, name) == ("checkpoint", "layer"):
        rates = [mean_rate(0, 2), mean_rate(2, 4)]
        expected = brute_force(folder / f"layers {cache}", Toy, "hidden", rates).scores()
        assert relative_error(alone, expected) < 1e-5


def test_preconditioned_scores_are_those_of_ddp(fits):
    folder, *_ = fits
    method = TracInWE(precondition="adam", normalize="cosine")
    found, expected = (scores_in(folder / name, method=method) for name in ("wrapped", "ddp checkpoint"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_tied_weights_are_stored_once(fits):
    folder, *_ = fits
    for checkpoint in Trace(folder / "tied").checkpoints:
        weights = checkpoint.weights()
        assert weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr()
        assert weights["head.weight"].shape == (40, 8)


@pytest.mark.parametrize("method", METHODS)
@each(["training", "recomputed training", "recomputing training"])
def test_gradients_taken_in_training_are_those_of_ddp(fits, name, method):
    folder, *_ = fits
    kind, whole = (Recomputing, "ddp held training") if name == "recomputing training" else (Toy, "ddp training")
    found, expected = scores_in(folder / name, kind, method=method), scores_in(folder / whole, method=method)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def assert_rounded(name, found, expected):
    error = relative_error(found, expected)
    assert error < ROUNDED
    assert error > 0 or "mixed" in name  # which Lightning, on a CPU, takes for sums over processes and buffers alone


@pytest.mark.parametrize("method", METHODS)
@each(["bfloat16", "mixed", "mixed training", "true", "true training"])
def test_a_fit_in_16_bits_finds_about_what_ddp_finds_in_32(fits, name, method):
    folder, *_ = fits
    whole = "ddp training" if "training" in name else "ddp checkpoint"
    found, expected = (scores_in(folder / each, method=method) for each in (name, whole))
    assert_rounded(name, found, expected)


@pytest.mark.parametrize("method", METHODS)
@each(HALF)
def test_processes_that_compute_in_16_bits_find_about_what_one_finds_in_32(fits, name, method):
    folder, *found = fits
    alone = scores_in(folder / name, HALF[name][0], method=method)
    for each in found:
        assert_rounded(name, torch.tensor(each[f"{name} {method}"]), alone)
        assert each[f"{name} kept"]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_taken_in_training_are_those_of_the_examples(fits, method):
    """The weights hardly move."""
    folder, *_ = fits
    n_came = 0
    fits_of = (Trace(folder / f"still {cache}").checkpoints for cache in ("training", "checkpoint"))
    for pair in zip(*fits_of, strict=True):
        found, expected = (
            torch.cat([shards.read(shard).example_norms() for shard in range(len(shards))])
            for shards in (each.gradients(site_of(each, method)) for each in pair)
        )
        came = found > 0
        n_came += int(came.sum())
        torch.testing.assert_close(found[came], expected[came], rtol=1e-4, atol=0)
    assert n_came > UNEVEN // 2


@pytest.mark.parametrize("method", METHODS)
@each(FITS)
def test_processes_that_spread_the_weights_find_what_one_finds(fits, name, method):
    folder, *found = fits
    alone = scores_in(folder / name, Toy if name == "wrapping" else FITS[name][0], method=method)
    for each in found:
        assert_same_scores(torch.tensor(each[f"{name} {method}"]), alone)
        assert each[f"{name} kept"]  # the module has the weights of the fit again


def test_a_new_module_is_spread_for_a_query(fits):
    folder, *found = fits
    alone, own = scores_in(folder / "whole"), quiet().self_influence(trace=folder / "whole")
    for each in found:
        assert_same_scores(torch.tensor(each["fresh"]), alone)
        assert_same_scores(torch.tensor(each["fresh own"]), own)
        assert_same_scores(torch.tensor(each["a single one"]), alone[3:4])


def test_processes_under_ddp_find_what_one_finds(fits):
    folder, *found = fits
    alone = scores_in(folder / "wrapped")
    for each in found:
        assert_same_scores(torch.tensor(each["by ddp"]), alone)


def test_both_processes_compute_at_the_statistics_that_are_recorded(fits, tmp_path):
    folder, *_ = fits
    shutil.copytree(folder / "normed", tmp_path / "normed")
    for checkpoint in Trace(tmp_path / "normed").checkpoints:
        shutil.rmtree(checkpoint.path / "words")
    again = scores_in(tmp_path / "normed", Normed, train_dataloaders=loader(TRAIN))
    assert_same_scores(scores_in(folder / "normed", Normed), again)


def test_a_resumed_fit_continues_its_trace(fits):
    folder, *_ = fits
    whole, resumed = (Trace(folder / name).checkpoints for name in ("straight", "resumed"))
    assert [each.step for each in resumed] == [each.step for each in whole] == [2, 4]
    assert [each.learning_rate for each in resumed] == [each.learning_rate for each in whole]
    scores = [scores_in(folder / name, Reproducible) for name in ("straight", "resumed")]
    assert_same_scores(*scores)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("spread", "ValueError: Another trainer has spread the weights of this Still"),
        ("broken test", "ValueError: The loss of test example . is NaN or infinite"),
        ("broken", "ValueError: The loss of training example 9 is NaN or infinite"),
        ("different data", "ValueError: Processes 0 and 1 have different training sets"),
        ("flat", "ValueError: With use_orig_params=False, FSDP hides which parameters"),
        ("replicas", "ValueError: FSDP leaves the weights whole here"),
        ("one to a group", "ValueError: FSDP leaves the weights whole here"),
        ("manual", "ValueError: Stepping optimizes manually in training_step, so that FSDP never ends"),
        ("logged", "ValueError: log_examples needs whole weights, which FSDP spreads"),
    ],
)
def test_an_error_is_raised_in_both_processes(fits, what, message):
    _, *found = fits
    for each in found:
        assert re.match(message, each[what])


def test_after_an_error_only_complete_checkpoints_are_there(fits):
    folder, *_ = fits
    assert [each.step for each in Trace(folder / "broken").checkpoints] == [2]
    assert not list((folder / "broken").rglob("*.partial"))


def test_replicas_of_pieces_are_left_out():
    """HYBRID_SHARD: the pieces of the first group of processes come again from the second."""
    moments = torch.arange(6.0).view(2, 3)

    class Sent:
        def gather(self, own):
            return [(moments.flatten()[:4], moments.shape), (moments.flatten()[4:], None)] * 2

    assert torch.equal(gathered_tensor(moments.flatten()[4:], None, Sent()), moments)


def test_strategies_that_spread_the_weights_otherwise_are_refused():
    class ModelParallelStrategy: ...

    class Sharded:  # Lightning builds no such trainer without a GPU
        world_size = 2
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="strategy is ModelParallelStrategy, which spreads the weights"):
        require_strategy(Sharded())
