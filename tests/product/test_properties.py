"""What holds for any model, data, sampler, cache and method: drawn at random, and held to brute force.

The number of examples is that of the profile: a few in `make test` (always the same), many in `make torture`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import TOLERANCES, Drawn, Expected, Fit, drawn_fits, drawn_methods
from torch.utils.data import DataLoader

from lightning_tracin import Trace, TracInSum, TracInWE
from lightning_tracin.querying import influence
from lightning_tracin.scoring.naming import is_constant_on_itself, without_normalizing
from lightning_tracin.storage import shards
from lightning_tracin.storage.files import read_json, write_json


@contextmanager
def fit_of(drawn: Drawn) -> Iterator[Fit]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(shards, "MOST_SHARD_EXAMPLES", drawn.shard_examples)
        patch.setattr(influence, "_BLOCK_BYTES", drawn.block_bytes)
        yield Fit(drawn, Path(folder) / "trace")


def ask(fit: Fit, method: Any, loader: DataLoader | None = None, **options: Any) -> Any:
    loaders = {"train_dataloaders": fit.train_loader()} if fit.drawn.cache == "on_demand" else {}
    return fit.trainer.influence(loader or fit.test_loader(), method=method, **loaders, **options)


def symmetric(method: Any) -> Any:
    """A method that treats both sides alike."""
    if isinstance(method, TracInSum):
        return replace(method, parts=[symmetric(part) for part in method.parts])
    return replace(method, normalize="cosine") if method.normalize == "train" else method


@given(data=st.data(), drawn=drawn_fits())
def test_scores_are_those_of_brute_force(data, drawn):
    with fit_of(drawn) as fit:
        for _ in range(2):
            method = data.draw(drawn_methods(drawn))
            result = ask(fit, method)
            scores = result.scores
            fit.expected(method).require(scores, drawn.dtype)
            trained = [index for index in range(drawn.n_train) if index not in result.undrawn]
            k = data.draw(st.integers(1, len(trained)))
            strongest = ask(fit, method, k=k)
            for top, largest in ((strongest.proponents(k), True), (strongest.opponents(k), False)):
                expected = scores[:, trained].topk(k, largest=largest).values
                torch.testing.assert_close(top.values, expected, rtol=1e-4, atol=1e-12)
                torch.testing.assert_close(top.values, scores.gather(1, top.indices), rtol=1e-4, atol=1e-12)


@given(data=st.data(), drawn=drawn_fits())
def test_self_influence_is_the_diagonal(data, drawn):
    with fit_of(drawn) as fit:
        method = symmetric(data.draw(drawn_methods(drawn)))
        if is_constant_on_itself(method):
            plain = without_normalizing(method)
            method = replace(plain, scales=method.scales) if isinstance(method, TracInSum) else plain
        loaders = {"train_dataloaders": fit.train_loader()} if drawn.cache == "on_demand" else {}
        found = fit.trainer.self_influence(method=method, **loaders)
        expected = fit.expected(method, side=fit.train)
        Expected(expected.scores.diagonal(), expected.bounds.diagonal()).require(found, drawn.dtype)


@given(data=st.data(), drawn=drawn_fits())
def test_words_add_up(data, drawn):
    with fit_of(drawn) as fit:
        method = data.draw(drawn_methods(drawn, words_only=True))
        result, expected = ask(fit, method), fit.expected(method)
        plain, terms = ask(fit, TracInWE()), fit.reference("embedding")
        bounds = fit.expected(TracInWE()).bounds
        for test_index in range(drawn.n_test):
            for train_index in range(drawn.n_train):
                pair = test_index, train_index
                total, bound = float(result.scores[pair]), float(expected.bounds[pair])
                assert abs(sum(term for _, term in result.words(*pair)) - total) <= 1e-4 * bound
                found = torch.zeros(drawn.vocabulary, dtype=torch.float64)
                for token, term in plain.words(*pair):
                    found[int(token)] = term
                errors = (found - terms.terms(*pair)).abs()
                assert float(errors.max()) <= TOLERANCES[drawn.dtype] * float(bounds[pair])


@given(data=st.data(), drawn=drawn_fits(dtype="float32"))
def test_the_sides_can_be_exchanged(data, drawn):
    """The influence of each training example on each other one, asked with them as test examples in any order."""
    with fit_of(drawn) as fit:
        method = symmetric(data.draw(drawn_methods(drawn)))
        order = data.draw(st.permutations(range(drawn.n_train)))
        size = data.draw(st.integers(1, drawn.n_train))
        scores = ask(fit, method, DataLoader(fit.train, size, sampler=order)).scores
        expected = fit.expected(method, side=fit.train)
        expected.require(scores, drawn.dtype)
        if all(fit.counted(steps).all() for steps in fit.steps):
            other = scores.T.double().masked_fill(expected.scores.isnan(), torch.nan)
            Expected(other, expected.bounds).require(scores, drawn.dtype)


@pytest.mark.filterwarnings("ignore:All scores by")  # with rates of 0
@given(data=st.data(), drawn=drawn_fits(), factor=st.sampled_from((0.0, 0.5, 3.0)))
def test_linear_in_the_rates_and_additive_over_checkpoints(data, drawn, factor):
    with fit_of(drawn) as fit:
        method = data.draw(drawn_methods(drawn, by_rates=True))
        before = ask(fit, method)
        trace = Trace(fit.path)
        for checkpoint in trace.checkpoints:
            content = read_json(checkpoint.path / "checkpoint.json")
            for step in content["steps"]:
                step[2] = [factor * rate for rate in step[2]]
            write_json(checkpoint.path / "checkpoint.json", content)
        torch.testing.assert_close(ask(fit, method).scores, factor * before.scores, rtol=1e-4, atol=1e-12)
        n_kept = data.draw(st.integers(1, len(fit.steps)))
        trace.drop_checkpoints_after(fit.steps[n_kept - 1].stop)
        expected = fit.expected(method, first=n_kept)
        Expected(factor * expected.scores, factor * expected.bounds).require(ask(fit, method).scores, drawn.dtype)
