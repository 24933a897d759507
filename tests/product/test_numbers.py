"""Numbers that users pass: what is none is told by name before anything is computed, and numpy's are as good as any."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import (
    InfluenceResult,
    Trace,
    TracInCallback,
    TracInLast,
    TracInLayer,
    TracInRidge,
    TracInSum,
    TracInWE,
    metrics,
)
from lightning_tracin.checked_numbers import (
    real_number,
    real_numbers,
    whole_number,
    whole_number_or_none,
    whole_numbers,
)
from lightning_tracin.metrics import functional
from lightning_tracin.retraining import random_halves, without

NO_WHOLE = (2.5, 2.0, True, "3", math.nan, -1, 2**70, np.float32(3), np.bool_(True), [3], torch.tensor(2.5))
NO_REAL = ("0.5", True, math.nan, -math.inf, np.float64("nan"), 10**400, [0.5], 1j)
COSINE, KFAC, PARTS = TracInWE(normalize="cosine"), {"precondition": "kfac"}, (TracInWE(), TracInLast())
SCORES, LABELS = torch.arange(6.0).view(2, 3), torch.tensor([0, 1, 1])


def recorded_with(name):
    return lambda value: TracInCallback(**{name: value})


def past_with(**options):
    return Trace.from_checkpoints("nowhere", [], Toy(), loader(), **options)


# By whom and by which argument a number is taken. There is nothing to query, so that a query would tell something else.
WHOLE = {
    "TracInWE, top_words": lambda value: TracInWE(top_words=value),
    "TracInLast, rank": lambda value: TracInLast(**KFAC, rank=(value, 4)),
    "TracInLayer, rank": lambda value: TracInLayer("head", **KFAC, rank=[4, value]),
    "TracInRidge, landmarks": lambda value: TracInRidge(COSINE, landmarks=value),
    "TracInCallback, every_n_epochs": recorded_with("every_n_epochs"),
    "TracInCallback, every_n_train_steps": recorded_with("every_n_train_steps"),
    "TracInCallback, top_words": recorded_with("top_words"),
    "TracInCallback, projection": recorded_with("projection"),
    "TracInCallback, log_k": recorded_with("log_k"),
    "TracInCallback, rank": lambda value: TracInCallback(rank=(value, 4)),
    "Trace, rank": lambda value: past_with(rank=(4, value)),
    "influence, k": lambda value: quiet().influence(k=value),
    "label_issues, n": lambda value: quiet().label_issues(n=value),
    "random_halves, n_train": lambda value: random_halves(value, 2),
    "random_halves, n": lambda value: random_halves(10, value),
    "random_halves, seed": lambda value: random_halves(10, 2, seed=value),
    "without, n_train": lambda value: without(value, []),
    "RecallAtK, k": lambda value: metrics.RecallAtK(k=value),
    "ClassDetection, k": lambda value: metrics.ClassDetection(LABELS, k=value),
    "TopKCardinality, k": lambda value: metrics.TopKCardinality(k=value),
    "CancellationEffect, n_parameters": lambda value: metrics.CancellationEffect(value),
    "Brittleness, ks": lambda value: metrics.Brittleness([value]),
    "DeletionCurve, resamples": lambda value: metrics.DeletionCurve([1], resamples=value),
    "TailPatch, seed": lambda value: metrics.TailPatch(seed=value),
    "top_k_cardinality, k": lambda value: functional.top_k_cardinality(SCORES, value),
    "deletion_curve, ks": lambda value: functional.deletion_curve(SCORES[:, :1], [value]),
    "tail_patch, resamples": lambda value: functional.tail_patch(SCORES, resamples=value),
}
REAL = {
    "TracInLast, damping": lambda value: TracInLast(**KFAC, damping=value),
    "TracInLayer, damping": lambda value: TracInLayer("head", damping=value),
    "TracInRidge, alpha": lambda value: TracInRidge(COSINE, alpha=value),
    "TracInRidge, residual": lambda value: TracInRidge(COSINE, residual=value),
    "TracInSum, mix": lambda value: TracInSum(PARTS, mix=(value, 1)),
    "TracInSum, scales": lambda value: TracInSum(PARTS, scales=(value, 1)),
    "Trace, learning_rates": lambda value: past_with(learning_rates=[value]),
    "random_halves, share": lambda value: random_halves(10, 2, share=value),
    "NoiseDetectionRate, at": lambda value: metrics.NoiseDetectionRate(at=value),
    "DeletionCurve, level": lambda value: metrics.DeletionCurve([1], level=value),
    "noise_detection_rate, at": lambda value: functional.noise_detection_rate(SCORES[0], LABELS == 1, at=value),
}
# What a result is asked with.
ASKED = {
    "proponents, k": lambda result, value: result.proponents(value),
    "opponents, k": lambda result, value: result.opponents(value),
    "aggregate, k": lambda result, value: result.aggregate("vote", value),
    "explanations, k": lambda result, value: result.explanations(k=value),
    "show, k": lambda result, value: result.show(0, value),
    "rows, k": lambda result, value: result.rows(value),
    "plot, k": lambda result, value: result.plot("labels", k=value),
    "save, k": lambda result, value: result.save("nowhere/result.safetensors", value),
    "to_html, k": lambda result, value: result.to_html("nowhere/page.html", value),
    "to_html, suspects": lambda result, value: result.to_html("nowhere/page.html", suspects=value),
    "label_issues, n": lambda result, value: result.label_issues(n=value),
    "word_table, n": lambda result, value: result.word_table(value),
    "word_table, min_examples": lambda result, value: result.word_table(min_examples=value),
}


def told(name, kind, value):
    """What an error must say: the argument, what it takes, and what it was given, alone or in a list."""
    return rf"^{name}(\[0\])? must be .*{kind} number.*, but got .*{re.escape(repr(value))}"


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_no_whole_number_is_told(what):
    for value in NO_WHOLE:
        with pytest.raises(ValueError, match=told(what.split(", ")[1], "whole", value)):
            WHOLE[what](value)


@pytest.mark.parametrize("what", REAL)
def test_what_is_no_real_number_is_told(what):
    for value in NO_REAL:
        with pytest.raises(ValueError, match=told(what.split(", ")[1], "finite", value)):
            REAL[what](value)


@pytest.mark.parametrize("what", ASKED)
def test_results_tell_it_too(result, what):
    for value in NO_WHOLE:
        with pytest.raises(ValueError, match=told(what.split(", ")[1], "whole", value)):
            ASKED[what](result, value)


def test_tables_of_words_tell_it_too(result):
    table = result.word_table()
    for value in (*NO_REAL, 1.5):
        with pytest.raises(ValueError, match=told("purity", "finite", value)):
            table.shortcuts(value)


@pytest.mark.parametrize("place", [1.5, True, math.nan, "1", None, torch.tensor(0.5), torch.tensor([0, 1])], ids=repr)
def test_what_is_no_place_is_told(result, place):
    for asked in (lambda: result.show(place), lambda: result.words(place, 0), lambda: result.explanations([place])):
        with pytest.raises(IndexError, match=rf"There are rows 0 to 5 .*, but got {re.escape(repr(place))}"):
            asked()
    with pytest.raises(IndexError, match=rf"There are training examples 0 to 19, but got {re.escape(repr(place))}"):
        result.words(0, place)


def test_excluded_tokens_are_no_truths():
    for tokens in ([True], [3, False], 7, [1.5]):
        with pytest.raises(ValueError, match=r"exclude_tokens must be token ids.*but got"):
            TracInWE(exclude_tokens=tokens)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("fit") / "trace")


@pytest.fixture(scope="module")
def result(fit):
    return fit.influence(loader(test_texts()))


HALF = np.float32(0.5)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (TracInWE(top_words=np.int64(3)), TracInWE(top_words=3)),
        (TracInWE(exclude_tokens=np.array([3, 5])), TracInWE(exclude_tokens=(3, 5))),
        (TracInLast(**KFAC, damping=HALF, rank=tuple(np.array([4, 2]))), TracInLast(**KFAC, damping=0.5, rank=(4, 2))),
        (
            TracInSum(PARTS, mix=np.array([1, 2]), scales=(HALF, Fraction(1, 4))),
            TracInSum(PARTS, mix=(1.0, 2.0), scales=(0.5, 0.25)),
        ),
        (
            TracInRidge(COSINE, alpha=HALF, residual=np.float16(0), landmarks=np.int32(7)),
            TracInRidge(COSINE, alpha=0.5, residual=0.0, landmarks=7),
        ),
    ],
    ids=str,
)
def test_results_by_numbers_of_numpy_are_saved_and_loaded(fit, tmp_path, given, plain):
    asked = fit.influence(loader(test_texts()), method=given, k=np.int64(4))
    loaded = InfluenceResult.load(asked.save(tmp_path / "result.safetensors", np.int8(2)))
    assert loaded.method == plain
    assert repr(loaded.method) == repr(plain) == repr(given)  # which would tell np.int64(3)
    expected = fit.influence(loader(test_texts()), method=plain, k=4)
    assert torch.equal(loaded.proponents(4).values, expected.proponents(4).values)


def test_fits_by_numbers_of_numpy_are_those_of_plain_ones(tmp_path):
    numbers = {"every_n_train_steps": 4, "top_words": 3, "projection": 5}
    for name, kind in (("plain", int), ("numpy", np.int64)):
        fitted(tmp_path / name, **{option: kind(value) for option, value in numbers.items()})
    plain, same = Trace(tmp_path / "plain"), Trace(tmp_path / "numpy")
    assert [each.step for each in same.checkpoints] == [4, 8]
    assert same.sites == plain.sites
    assert quiet().self_influence(Toy(), trace=same).equal(quiet().self_influence(Toy(), trace=plain))


def test_numbers_are_kept_as_plain_ones():
    plan = TracInCallback(
        every_n_epochs=np.int16(2), rank=np.array([8, 4]).tolist(), log_examples=np.array([3, 1]), log_k=np.uint8(2)
    ).plan
    assert (plan.every_n_epochs, plan.options.rank, plan.log_examples, plan.log_k) == (2, (8, 4), (3, 1), 2)
    numbers = (plan.every_n_epochs, *plan.options.rank, *plan.log_examples, plan.log_k)
    assert {type(each) for each in numbers} == {int}
    metric = metrics.DeletionCurve(np.array([1, 5]), level=HALF, resamples=np.int64(10))
    assert (metric.ks, tuple(metric.bootstrap)) == ((1, 5), (0.5, 10, 0))
    assert {type(each) for each in (*metric.ks, *metric.bootstrap)} == {int, float}


def test_bounds_are_within_and_named():
    assert [whole_number("n", each, 0, 3) for each in (0, 3)] == [0, 3]
    assert whole_number_or_none("n", None) is None
    assert whole_numbers("n", torch.tensor([4, 1])) == (4, 1)
    assert real_numbers("x", np.array([0.5, 2]), above=0) == (0.5, 2.0)
    assert [real_number("x", each, at_least=0, at_most=1) for each in (0, 1)] == [0.0, 1.0]
    for wrong, message in (
        (lambda: whole_number("n", 4, 0, 3), r"n must be a whole number from 0 to 3, but got 4\."),
        (lambda: whole_number("n", 2**62 + 1), r"n must be a whole number of at most 2\*\*62, but got"),
        (lambda: whole_number("n", 1, 2, why=", as one is few"), "of at least 2, as one is few, but got 1"),
        (lambda: whole_number_or_none("n", 0), "n must be None or a whole number of at least 1, but got 0"),
        (lambda: whole_numbers("n", "12"), "n must be a list of numbers, but got '12'"),
        (lambda: whole_numbers("n", 3), "n must be a list of numbers, but got 3"),
        (lambda: real_number("x", 0, above=0), "x must be a finite number above 0, but got 0"),
        (lambda: real_number("x", 1, above=0, below=1), "x must be a finite number above 0 and below 1, but got 1"),
        (lambda: real_number("x", 2, at_least=0, at_most=1), "of at least 0 and of at most 1, but got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
