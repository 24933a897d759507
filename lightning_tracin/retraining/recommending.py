"""recommend: which scores to trust, told by a few retrainings of the user's own model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.bridge.compat import lightning_of
from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.metrics.functional import linear_datamodeling_difference, linear_datamodeling_score
from lightning_tracin.metrics.functional.linear_datamodeling_score import FEWEST, LDSResult
from lightning_tracin.querying.influence import influence
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.candidates import baseline_scores, candidate_methods
from lightning_tracin.retraining.checks import (
    checked_rows,
    epochs_of,
    number_removed,
    require_proponents,
    warn_of_other_steps,
)
from lightning_tracin.retraining.fits import QUIET, Build, Fit, apart
from lightning_tracin.retraining.folder import Retraining
from lightning_tracin.retraining.outcomes import Outcome
from lightning_tracin.retraining.recommendation import Measured, Question, Recommendation, described
from lightning_tracin.retraining.removals import BASELINES, PROPONENTS, Removals
from lightning_tracin.retraining.retrainings import Retrainings
from lightning_tracin.retraining.subsets import random_halves, without
from lightning_tracin.retraining.targets import Quantity, quantity_of, values_of
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of
from lightning_tracin.storage.trace import Trace

_ENOUGH = 8  # test examples, below which their mean is mostly chance

_CHANGES: dict[Quantity, str] = {  # for the worse
    "probability": "fall of the target's probability",
    "loss": "rise of the target's loss",
}


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
    removal lowers the probability of the label most, or raises the loss where no class is said. Beside them stand
    random examples of the same label (of any, where one has no or few of its label), and the nearest by TF-IDF. Each
    test example has a seed of its own, so that no two share a fit: they are independent, and standard errors are over
    them. It takes at most ``retrainings`` x (methods + 3) fits: one on all, and one for each method and baseline.

    "weigh" retrains on random halves, and asks whose summed scores tell best which half is better for a test example:
    a small linear datamodeling score (LDS). Beside them stand the number of examples of the same label, and TF-IDF.
    Standard errors are over halves, by the jackknife. Half of the halves are retrained on with a second seed: what that
    changes no method can know, and sets a ceiling.

    Methods are compared pair by pair, on the same retrainings: one is better than another if the 95 % interval of the
    difference, by Student's t, leaves out 0. None is recommended that is not above 0, and above what is left out at
    random. 8 halves put coarse differences in the right order, in nine of ten draws; finer ones need more.

    Args:
        trace: what the fit recorded, or its folder. Gradients that a candidate needs and the trace lacks are computed,
            and kept there.
        build: ``build(indices, seed)`` returns a module, freshly initialised by the seed, and the loader of the
            training examples with these indices. It must train as the fit did that left the trace.
        test: test examples, in a loader or a data set, with their labels; or several of these.
        question: what scores are wanted for.
        retrainings: "explain": how many test examples are looked at, each with a retraining for each method and
            baseline; "weigh": how many halves.
        methods: the candidates, by name, in a list, or one; by default those that make sense for what the trace has.
        k: of "explain", how many proponents are removed.
        test_indices: of "explain", which test examples, by their rows of a result; by default ``retrainings`` of them
            at random.
        trainer: a number of epochs, for a quiet trainer on one device; or a function that makes a new trainer for each
            fit. By default as many epochs as the trace has.
        folder: where retrainings are kept; by default in a temporary one, which is removed.

    Raises:
        TypeError: if ``build`` takes or returns something else, or the test examples come in something else.
        ValueError: if the training set is not that of the trace, if there are too few retrainings or test examples, or
            no candidates.

    Warns:
        UserWarning: there are fewer than 8 test examples to explain, or halves to weigh.
    """
    if question not in ("explain", "weigh"):
        raise ValueError(f"question must be 'explain' or 'weigh', but got {question!r}.")
    fewest = FEWEST if question == "weigh" else 2
    retrainings = whole_number("retrainings", retrainings, fewest, why=f" to {question}, where 8 are few")
    trace = trace if isinstance(trace, Trace) else Trace(trace)
    k = number_removed(k, trace.n_train - len(trace.undrawn)) if question == "explain" else whole_number("k", k)
    uncommon = question == "weigh" and trace.has_texts  # measured for this question alone, which asks for no more fits
    usual = candidate_methods(trace.sites, trace.n_train, uncommon=uncommon)
    candidates = _named(usual if methods is None else methods)
    with ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="retrainings-"))
        fit = epochs_of(trace) if trainer is None else trainer
        runs = Retrainings(place, build, test, n_train=trace.n_train, trainer=fit)
        chosen = [] if question == "weigh" else _chosen_tests(runs.n_test, retrainings, test_indices)
        results = _results(trace, runs, test, candidates)
        if trainer is None and isinstance(fit, int):
            warn_of_other_steps(trace, runs.built_on_few[0], runs.loader_of_all, fit)
        if question == "weigh":
            return _weighed(trace, runs, results, retrainings)
        return _explained(runs, results, k, checked_rows(next(iter(results.values())), chosen))


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
    n_halves = len(lds[name].leave_one_out)
    return Measured(
        name, method, float(lds[name].mean), float(lds[name].se_subsets), behind, error, n_halves, len(results)
    )


def _all_scores(result: InfluenceResult) -> Tensor:
    assert result.scores is not None
    return result.scores


def _chosen_tests(n_test: int, n: int, asked: Sequence[int] | None) -> list[int]:
    """Which test examples are looked at: each once, at random if none are asked for, the same first ones each time.

    Raises:
        ValueError: if there is only one.
    """
    if asked is None:
        chosen = torch.randperm(n_test, generator=torch.Generator().manual_seed(0))[:n].tolist()
    else:
        chosen = list(dict.fromkeys(torch.as_tensor(asked).reshape(-1).tolist()))
    if len(chosen) < 2:
        raise ValueError(
            f"'explain' needs at least 2 different test examples, but got {len(chosen)}: one tells nothing about which "
            "method is better. To ask of one prediction whether its proponents matter, use does_it_matter."
        )
    if len(chosen) < _ENOUGH:
        rank_zero_warn(
            f"{len(chosen)} test examples are looked at: below {_ENOUGH} it is mostly chance which method is better.",
            category=UserWarning,
        )
    return chosen


def _explained(runs: Retrainings, results: Mapping[str, InfluenceResult], k: int, rows: Tensor) -> Recommendation:
    """A small case deletion by each method, and by what knows no model."""
    first = next(iter(results.values()))
    for result in results.values():
        require_proponents(result, rows, k)
    seeds = range(len(rows))  # one for each test example: a fit that two shared would err for both alike
    removals = Removals(first, rows, k, len(seeds), BASELINES)
    chosen: dict[str, Tensor] = {name: result.proponents(k).indices[rows] for name, result in results.items()}
    baselines = _of_baselines(removals)
    chosen |= baselines
    base = [Retraining(removals.drawn, seed) for seed in seeds]
    asked = {
        name: [each for each in map(removals.without, of_name, seeds) if each is not None]
        for name, of_name in chosen.items()
    }
    wanted = [*base, *(each for of_name in asked.values() for each in of_name)]
    found = dict(zip((each.key for each in wanted), runs.run_each(wanted), strict=True))
    quantity = quantity_of(first, found.values())
    said = partial(_said, first, rows, quantity=quantity, found=found)
    before, sign = said(base), -1 if quantity == "probability" else 1
    changes = {name: sign * (said(of_name) - before) for name, of_name in asked.items()}
    best = max(results, key=lambda name: float(changes[name].mean()))
    stands_in = ["Random examples stand in for those of the same label."] if "random" in baselines else []
    measured = [_measured_change(name, changes, best, results) for name in changes]
    return Recommendation(
        question="explain",
        what=described("explain", change=_CHANGES[quantity], k=k),
        measured=sorted(measured, key=lambda each: -each.value),
        n_fits=len({each.key for each in wanted}),
        notes=[f"{len(rows)} test examples, each with a seed of its own.", *removals.notes, *stands_in],
    )


def _of_baselines(removals: Removals) -> dict[str, Tensor]:
    """What baselines leave out, (n, k) for each test example with its own seed.

    Random examples stand in for those of the same label where a test example has not enough of these.
    """
    chosen = {name: each.diagonal().T for name, each in removals.chosen.items() if name != PROPONENTS}
    has_all = "same label" in chosen and bool((chosen["same label"] >= 0).all())
    return {name: each for name, each in chosen.items() if name != ("random" if has_all else "same label")}


def _said(
    result: InfluenceResult,
    rows: Tensor,
    retrainings: Sequence[Retraining],
    quantity: Quantity,
    found: Mapping[str, Outcome],
) -> Tensor:
    """(n,) what is said of the target of each row by a retraining of its own."""
    of_each = zip(rows[:, None], retrainings, strict=True)
    return torch.cat([values_of(result, row, found[each.key], quantity) for row, each in of_each])


def _measured_change(
    name: str, changes: Mapping[str, Tensor], best: str, results: Mapping[str, InfluenceResult]
) -> Measured:
    value, error = _mean_and_error(changes[name])
    behind, behind_error = _mean_and_error(changes[best] - changes[name])
    method = results[name].method if name in results else None
    return Measured(name, method, value, error, behind, behind_error, len(changes[name]), len(results))


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over test examples, and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
