"""How checkpoints count (``weights=``), against brute force in double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from still_fits import Still
from torch.utils.data import DataLoader
from toy import N_TEST, N_TRAIN, STEPS_PER_EPOCH, Toy, fitted, loader, mean_rate, quiet, site_of, test_texts, texts

from lightning_tracin import Trace, TracInLast, TracInLayer, TracInRidge, TracInSum, TracInWE
from lightning_tracin.querying import influence as influence_module
from lightning_tracin.scoring.naming import described, method_from_json, method_to_json
from lightning_tracin.storage import shards

SITES = ("tracin-we", "tracin-last", "hidden")
LAYERS = {TracInWE: "embedding", TracInLast: "head", TracInLayer: "hidden"}
METHODS = [
    TracInWE(normalize="cosine", weights="residual"),
    TracInWE(exclude_tokens=(3, 5), weights="equal"),
    TracInLast(weights="residual"),
    TracInLayer("hidden", normalize="train", weights="residual"),
    TracInLayer("hidden", weights="equal"),
]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The folder of a fit with each cache; that of training from weights that stay where they are."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MOST_SHARD_EXAMPLES", 7)
        for cache in ("checkpoint", "training", "on_demand"):
            fitted(folder / cache, (Still if cache == "training" else Toy)(), cache=cache, methods=SITES)
    return folder


def loss_of(module):
    return lambda batch: module.influence_loss(batch).sum()


@cache
def dense(folder, layer: str):
    """At each checkpoint, the dense gradients of the test and of the training examples, and the latters' losses."""
    found = []
    for checkpoint in Trace(folder).checkpoints:
        module = Toy().eval()
        module.load_state_dict(checkpoint.weights())
        module.double()
        part, sides = module.get_submodule(layer), (test_texts(), texts())
        with torch.no_grad():
            losses = torch.cat([module.influence_loss(batch) for batch in DataLoader(texts())])
        found.append([*(dense_gradients(module, part, DataLoader(side), loss_of(module)) for side in sides), losses])
    return found


def reference(trace, method) -> BruteForce:
    """Dense gradients at the weights of each checkpoint, which count as the method says."""
    weights = []
    found = dense(trace.path, LAYERS[type(method)])
    for number, (_, _, losses) in enumerate(found):
        rate = mean_rate(STEPS_PER_EPOCH * number, STEPS_PER_EPOCH * (number + 1))
        residual = math.sqrt(float((1 - losses.neg().exp()).mean()))
        weights.append({"learning-rate": rate, "equal": 1.0, "residual": residual}[method.weights])
    return BruteForce(weights, [each[0] for each in found], [each[1] for each in found])


def expected(trace, method) -> torch.Tensor:
    left_out = getattr(method, "exclude_tokens", ())
    return reference(trace, method).scores(normalize=method.normalize, exclude_tokens=left_out)


def ask(folder, method, **options):
    return quiet().influence(
        loader(test_texts()), Toy(), trace=folder, train_dataloaders=loader(), method=method, **options
    )


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scores_are_those_of_brute_force(traces, cache, method):
    folder = traces / cache
    scores = ask(folder, method).scores
    assert relative_error(scores, expected(Trace(folder), method)) < 1e-5
    strongest = ask(folder, method, k=4)
    torch.testing.assert_close(strongest.proponents(4).values, scores.topk(4).values)
    torch.testing.assert_close(strongest.opponents(4).values, scores.topk(4, largest=False).values)


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[2:3], ids=str)
def test_blocks_of_test_examples_do_not_matter(traces, monkeypatch, method):
    whole = ask(traces / "checkpoint", method)
    monkeypatch.setattr(influence_module, "_BLOCK_BYTES", 1)
    # Of scores that cancel to nearly 0, the rounding of float32 leaves nothing: the error is that of all together.
    assert relative_error(ask(traces / "checkpoint", method).scores, whole.scores) < 1e-6


def test_words_add_up(traces):
    method = TracInWE(normalize="cosine", weights="residual")
    result = ask(traces / "checkpoint", method)
    for test_index in (1, N_TEST - 1):
        for train_index in range(N_TRAIN):
            terms = sum(term for _, term in result.words(test_index, train_index))
            assert terms == pytest.approx(float(result.scores[test_index, train_index]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("weights", ["equal", "residual"])
def test_self_influence_is_the_diagonal(traces, weights):
    for method in (TracInWE(weights=weights), TracInLast(weights=weights)):
        trace = Trace(traces / "checkpoint")
        own = quiet().self_influence(trace=trace, method=method)
        of_train = quiet().influence(loader(), Toy(), trace=trace, method=method).scores
        torch.testing.assert_close(own, of_train.diagonal(), rtol=1e-4, atol=1e-6)


def test_a_query_on_demand_stores_what_tells_residuals(tmp_path):
    fitted(tmp_path, cache="on_demand")
    ask(tmp_path, TracInWE(weights="equal"))
    last = site_of(Trace(tmp_path), "tracin-last")
    assert not any(each.has_gradients(last) for each in Trace(tmp_path).checkpoints)
    ask(tmp_path, TracInWE(weights="residual"))
    assert all(each.has_gradients(last) for each in Trace(tmp_path).checkpoints)


def test_the_last_checkpoint_alone(traces):
    """Its weight does not depend on the others."""
    trace, method = Trace(traces / "checkpoint"), TracInLast(weights="residual")
    brute = reference(trace, method)
    alone = BruteForce(brute.rates[-1:], brute.test[-1:], brute.train[-1:]).scores()
    assert relative_error(ask(traces / "checkpoint", method, checkpoints="last").scores, alone) < 1e-5


class StillWords(Toy):
    """Its embedding has a rate of 0."""

    def configure_optimizers(self):
        others = [*self.hidden.parameters(), *self.head.parameters()]
        return torch.optim.SGD([{"params": self.embedding.parameters(), "lr": 0.0}, {"params": others, "lr": 0.1}])


def test_scores_that_count_no_checkpoint_are_told_by_every_method_alike(tmp_path):
    fit = fitted(tmp_path, StillWords())
    cosine = TracInWE(normalize="cosine")
    for method in (TracInWE(), TracInRidge(cosine)):
        with pytest.warns(UserWarning, match=r"All scores by TracIn.* are 0: .* was always 0 at embedding"):
            assert not fit.influence(loader(test_texts()), method=method).scores.any()
    with pytest.warns(UserWarning, match="was always 0 at embedding"):
        assert not fit.self_influence(method=TracInWE()).any()
    for method in (TracInWE(weights="equal"), TracInLast(), TracInSum((cosine, TracInLast()), scales=(1, 1))):
        assert fit.influence(loader(test_texts()), method=method).scores.any()  # a warning would be an error


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_they_are_read_from_json_and_described(method):
    assert method_from_json(method_to_json(method)) == method
    assert described(method) != described(replace(method, weights="learning-rate"))
    older = {name: value for name, value in method_to_json(method).items() if name != "weights"}
    assert method_from_json(older) == replace(method, weights="learning-rate")
