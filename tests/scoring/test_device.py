"""Scores that another device computes are those of the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from elsewhere import DEVICE, Accelerator, Elsewhere
from random_gradients import JOINS, random_linear, random_words
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import TracInLast, TracInWE
from lightning_tracin.scoring.preconditioners import AdamMoments
from lightning_tracin.scoring.score import score
from lightning_tracin.storage.second_moments import SecondMoments

METHODS = [
    TracInWE(),
    TracInWE(top_words=3, normalize="cosine"),
    TracInWE(precondition="adam"),
    TracInLast(),
    TracInLast(normalize="train", precondition="adam"),
    TracInLast(normalize="cosine", precondition="kfac"),
]


@pytest.fixture(params=["pretended", "cuda"] if torch.cuda.is_available() else ["pretended"])
def device(request):
    """A device, and what must be entered to use it."""
    pretended = request.param == "pretended"
    return (DEVICE, Accelerator()) if pretended else (torch.device("cuda"), nullcontext())


def assert_same_elsewhere(device, method, test, train, by):
    expected = method.dot(test, train, by)
    place, entered = device
    with entered:
        scores = method.dot(test.to(place), train, by)
        assert scores.device.type == place.type
        torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_on_the_pretended_device_does_not_meet_what_is_not():
    with Accelerator() as accelerator:
        there = torch.ones(3, 2).to(DEVICE)
        assert isinstance(there, Elsewhere)
        assert there.view(-1).mul_(2).cpu().tolist() == [2] * 6
        assert there.cpu().sum() == 12
        with pytest.raises(RuntimeError, match="same device"):
            there @ torch.ones(2, 1)
        with pytest.raises(RuntimeError, match="same device"):
            there.index_add_(0, torch.zeros(1, dtype=torch.long), there[:1])
    assert "mul_" in accelerator.operations


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("n_test", "n_train", "vocabulary"), JOINS)
def test_words_are_joined_elsewhere(device, n_test, n_train, vocabulary, dtype):
    method = TracInWE()
    test = method.prepare(random_words(n_test, vocabulary)[0], None, "test")
    train = method.prepare(random_words(n_train, vocabulary)[0].as_dtype(dtype), None, "train")
    assert_same_elsewhere(device, method, test, train, None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positions", [1, 4])
def test_last_layers_are_multiplied_elsewhere(device, positions, weighted):
    by = AdamMoments(SecondMoments(torch.rand(4, 5), None, 1e-8), Path()) if weighted else None
    test, train = random_linear(7, positions)[0], random_linear(50, positions)[0].as_dtype("float16")
    assert_same_elsewhere(device, TracInLast(), test, train, by)


@pytest.mark.parametrize("method", METHODS)
def test_a_query_multiplies_elsewhere(tmp_path, monkeypatch, device, method):
    """On what a fit stored; the whole result is that of the CPU."""
    trainer = fitted(tmp_path, Toy())
    expected = trainer.influence(loader(test_texts()), method=method)
    strongest = trainer.influence(loader(test_texts()), method=method, k=3)
    place, entered = device

    def elsewhere(tests, k, processes, of_model):
        assert of_model == trainer.strategy.root_device
        with entered:
            return score(tests, k, processes, place)

    monkeypatch.setattr("lightning_tracin.bridge.queries.score", elsewhere)
    result = trainer.influence(loader(test_texts()), method=method)
    torch.testing.assert_close(result.scores, expected.scores)
    torch.testing.assert_close(result.totals, expected.totals)
    top = trainer.influence(loader(test_texts()), method=method, k=3)
    for side in ("strongest_proponents", "strongest_opponents"):
        found, wanted = getattr(top, side), getattr(strongest, side)
        assert torch.equal(found.indices, wanted.indices)
        torch.testing.assert_close(found.values, wanted.values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fit_and_a_query_on_a_gpu_score_as_on_the_cpu(tmp_path):
    for cache in ("checkpoint", "training", "on_demand"):
        options = {"accelerator": "gpu", "devices": 1}
        trainer = fitted(tmp_path / cache, Toy(), cache=cache, dtype="float32", trainer=options)
        on_gpu = trainer.influence(loader(test_texts()))
        on_cpu = quiet().influence(loader(test_texts()), model=Toy(), trace=tmp_path / cache)
        torch.testing.assert_close(on_gpu.scores, on_cpu.scores, rtol=1e-3, atol=1e-6)
