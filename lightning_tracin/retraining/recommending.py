"""recommend: which scores to trust, told by a few retrainings of the user's own model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.bridge.compat import lightning_of
from lightning_tracin.metrics.functional import linear_datamodeling_difference, linear_datamodeling_score
from lightning_tracin.metrics.functional.linear_datamodeling_score import FEWEST, LDSResult
from lightning_tracin.querying.influence import influence
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.candidates import baseline_scores, candidate_methods
from lightning_tracin.retraining.checks import checked_rows, epochs_of, require_proponents
from lightning_tracin.retraining.fits import QUIET, Build, Fit, apart
from lightning_tracin.retraining.folder import Retraining
from lightning_tracin.retraining.recommendation import Measured, Question, Recommendation, described
from lightning_tracin.retraining.removals import Removals
from lightning_tracin.retraining.retrainings import Retrainings
from lightning_tracin.retraining.subsets import random_halves, without
from lightning_tracin.retraining.targets import quantity_of, values_of
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of
from lightning_tracin.storage.trace import Trace

_SEEDS = 2  # of "explain": half of the test examples are looked at with each


def recommend(
    trace: Trace | str | Path,
    build: Build,
    test: Any,
    question: Question = "explain",
    retrainings: int = 8,
    *,
    methods: Mapping[str, Method] | Sequence[Method] | Method | None = None,
    k: int = 20,
    test_indices: Sequence[int] | None = None,
    trainer: Fit | None = None,
    folder: str | Path | None = None,
) -> Recommendation:
    """Measure candidate methods by a few retrainings, and say which to use, or that it cannot be told.

    No method is best everywhere, and the question decides: what shows best which few examples made the model say
    something is not what predicts best what any part of the data would do.

    "explain" retrains without the ``k`` strongest proponents of some test examples, for each method, and asks whose
    removal lowers the probability of the label most. Beside them stand random examples of the same label, and the
    nearest by TF-IDF. Standard errors are over test examples.

    "weigh" retrains on random halves, and asks whose summed scores tell best which half is better for a test example:
    a small linear datamodeling score (LDS). Beside them stand the number of examples of the same label, and TF-IDF.
    Standard errors are over halves, by the jackknife. Half of the halves are retrained on with a second seed: what that
    changes no method can know, and sets a ceiling.

    Methods are compared pair by pair, on the same retrainings: one is better than another if the difference is two
    standard errors. 8 halves tell coarse differences, in nine of ten draws; finer ones need more.

    Args:
        trace: what the fit recorded, or its folder. Gradients that a candidate needs and the trace lacks are computed,
            and kept there.
        build: ``build(indices, seed)`` returns a module, freshly initialised by the seed, and the loader of the
            training examples with these indices. It must train as the fit did that left the trace.
        test: test examples, in a loader or a data set, with their labels; or several of these.
        question: what scores are wanted for.
        retrainings: "explain": how many test examples are looked at, each with a retraining for each method; "weigh":
            how many halves.
        methods: the candidates, by name, in a list, or one; by default those that make sense for what the trace has.
        k: of "explain", how many proponents are removed.
        test_indices: of "explain", which test examples; by default some at random.
        trainer: a number of epochs, for a quiet trainer on one device; or a function that makes a new trainer for each
            fit. By default as many epochs as the trace has.
        folder: where retrainings are kept; by default in a temporary one, which is removed.

    Raises:
        TypeError: if ``build`` takes or returns something else, or the test examples come in something else.
        ValueError: if the training set is not that of the trace, if there are too few retrainings, or no candidates.
    """
    if question not in ("explain", "weigh"):
        raise ValueError(f"question must be 'explain' or 'weigh', but got {question!r}.")
    if question == "weigh" and retrainings < FEWEST:
        raise ValueError(f"retrainings must be at least {FEWEST} to weigh, but got {retrainings}; 8 are few.")
    if question == "explain" and retrainings < 2:
        raise ValueError(f"retrainings must be at least 2 to explain, but got {retrainings}; 8 are few.")
    trace = trace if isinstance(trace, Trace) else Trace(trace)
    candidates = _named(candidate_methods(trace.sites, trace.n_train) if methods is None else methods)
    with ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="retrainings-"))
        fit = epochs_of(trace) if trainer is None else trainer
        runs = Retrainings(place, build, test, n_train=trace.n_train, trainer=fit)
        results = _results(trace, runs, test, candidates)
        if question == "weigh":
            return _weighed(trace, runs, results, retrainings)
        return _explained(runs, results, k, _chosen_rows(results, retrainings, test_indices))


def _named(methods: Any) -> dict[str, Method]:
    """Candidates by name; one may come by itself.

    Raises:
        ValueError: if there are none, or one is no method.
    """
    several = [methods] if hasattr(methods, "summands") or isinstance(methods, str) else methods
    named: dict[str, Method] = dict(several) if isinstance(several, Mapping) else {str(each): each for each in several}
    for method in named.values():
        method_of(method)  # before anything is computed
    if not named:
        raise ValueError("There are no candidate methods to choose from: pass some as methods=[...].")
    return named


def _results(
    trace: Trace, runs: Retrainings, test: Any, candidates: Mapping[str, Method]
) -> dict[str, InfluenceResult]:
    """The scores of all candidates."""
    module, loader = runs.built_on_all
    with apart():
        trainer = lightning_of(module).Trainer(**QUIET)
        asked: dict[str, Any] = {"model": module, "train_dataloaders": loader, "trace": trace}
        return {name: influence(trainer, test, method=method, **asked) for name, method in candidates.items()}


def _weighed(trace: Trace, runs: Retrainings, results: Mapping[str, InfluenceResult], n: int) -> Recommendation:
    """A small LDS of each method, and of what knows no model."""
    first = next(iter(results.values()))
    halves = random_halves(trace.n_train, n) & without(trace.n_train, first.undrawn)
    twice = halves[: max(FEWEST, n // 2)]
    asked = [*(Retraining(kept, 0) for kept in halves), *(Retraining(kept, 1) for kept in twice)]
    outputs = -torch.stack([each.losses for each in runs.run_each(asked)])
    scores = {name: _all_scores(result) for name, result in results.items()}
    scores |= baseline_scores(first.test_texts, trace.texts(range(trace.n_train)))
    lds = {name: linear_datamodeling_score(each, halves, outputs[:n]) for name, each in scores.items()}
    best = max(results, key=lambda name: float(lds[name].mean))
    both = torch.stack([outputs[: len(twice)], outputs[n:]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are few, a note says
        again = linear_datamodeling_score(scores[best], twice, both)
    reliability = 0.0 if again.reliability is None else max(0.0, float(again.reliability))
    measured = [_measured_lds(name, lds, best, results) for name in scores]
    return Recommendation(
        question="weigh",
        what=described("weigh", n=n),
        measured=sorted(measured, key=lambda each: -each.value),
        n_fits=len(asked),
        ceiling=reliability**0.5,
        notes=[f"The ceiling is of {len(twice)} halves with two seeds each."],
    )


def _measured_lds(
    name: str, lds: Mapping[str, LDSResult], best: str, results: Mapping[str, InfluenceResult]
) -> Measured:
    behind, error = (0.0, 0.0) if name == best else map(float, linear_datamodeling_difference(lds[best], lds[name]))
    method = results[name].method if name in results else None
    return Measured(name, method, float(lds[name].mean), float(lds[name].se_subsets), behind, error)


def _all_scores(result: InfluenceResult) -> Tensor:
    assert result.scores is not None
    return result.scores


def _chosen_rows(results: Mapping[str, InfluenceResult], n: int, test_indices: Sequence[int] | None) -> Tensor:
    """Test examples at random, the same each time."""
    first = next(iter(results.values()))
    if test_indices is not None:
        return checked_rows(first, test_indices)
    n_test = len(first.test_indices)
    return torch.randperm(n_test, generator=torch.Generator().manual_seed(0))[:n].sort().values


def _explained(runs: Retrainings, results: Mapping[str, InfluenceResult], k: int, rows: Tensor) -> Recommendation:
    """A small case deletion by each method, and by what knows no model."""
    first = next(iter(results.values()))
    if not 1 <= k < first.n_train - len(first.undrawn):
        raise ValueError(f"k must be from 1 to {first.n_train - len(first.undrawn) - 1}, but got {k}.")
    for result in results.values():
        require_proponents(result, rows, k)
    removals = Removals(first, rows, k, _SEEDS, ("same label", "tf-idf"))
    chosen: dict[str, Tensor] = {name: result.proponents(k).indices[rows] for name, result in results.items()}
    seeds = torch.arange(len(rows)) % _SEEDS
    for name in ("same label", "tf-idf"):
        if name in removals.chosen:
            chosen[name] = removals.chosen[name][torch.arange(len(rows)), seeds]
    base = [Retraining(removals.drawn, seed) for seed in range(_SEEDS)]
    asked = {
        name: [removals.without(*pair) for pair in zip(each, seeds.tolist(), strict=True)]
        for name, each in chosen.items()
    }
    wanted = [*base, *(each for of_name in asked.values() for each in of_name if each is not None)]
    found = dict(zip((each.key for each in wanted), runs.run_each(wanted), strict=True))
    quantity = quantity_of(first, found[base[0].key])
    sign = 1 if quantity == "probability" else -1

    def fall(place: int, seed: int, each: Retraining | None) -> float:
        if each is None:
            return float("nan")
        row = rows[place : place + 1]
        before, after = (values_of(first, row, found[key]) for key in (base[seed].key, each.key))
        return sign * float(before - after)

    falls = {
        name: torch.tensor([fall(place, int(seeds[place]), each) for place, each in enumerate(of_name)])
        for name, of_name in asked.items()
    }
    best = max(results, key=lambda name: float(falls[name].mean()))
    measured = [_measured_fall(name, falls, best, results) for name in falls]
    return Recommendation(
        question="explain",
        what=described("explain", quantity=quantity, k=k),
        measured=sorted(measured, key=lambda each: -each.value),
        n_fits=len({each.key for each in wanted}),
        notes=[f"{len(rows)} test examples, {_SEEDS} seeds.", *removals.notes],
    )


def _measured_fall(
    name: str, falls: Mapping[str, Tensor], best: str, results: Mapping[str, InfluenceResult]
) -> Measured:
    value, error = _mean_and_error(falls[name])
    behind, behind_error = (0.0, 0.0) if name == best else _mean_and_error(falls[best] - falls[name])
    return Measured(name, results[name].method if name in results else None, value, error, behind, behind_error)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over test examples, and its standard error; NaN of an example counts as missing."""
    known = values[~values.isnan()]
    return float(known.mean()), float(known.std() / len(known) ** 0.5)
