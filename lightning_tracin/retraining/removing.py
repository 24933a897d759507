"""does_it_matter: are the proponents of a result what made the model say it? Told by training without them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.checks import (
    check_module,
    check_training_set,
    checked_rows,
    epochs_of,
    number_removed,
    require_proponents,
    require_same_test,
    warn_of_other_steps,
)
from lightning_tracin.retraining.distinct_fits import notes_of_seeds
from lightning_tracin.retraining.fits import Build, Fit
from lightning_tracin.retraining.folder import Retraining
from lightning_tracin.retraining.outcomes import Outcome
from lightning_tracin.retraining.removal_effect import RemovalEffect
from lightning_tracin.retraining.removals import BASELINES, Baseline, Removals
from lightning_tracin.retraining.retrainings import Retrainings
from lightning_tracin.retraining.targets import quantity_of, target_name, values_of


def does_it_matter(
    result: InfluenceResult,
    build: Build,
    test: Any,
    k: int = 20,
    seeds: int = 5,
    *,
    test_indices: Sequence[int] | None = None,
    against: Baseline | Sequence[Baseline] = BASELINES,
    trainer: Fit | None = None,
    folder: str | Path | None = None,
) -> RemovalEffect:
    """Retrain without the proponents of test examples, and without others, and compare what the models say.

    For each test example and seed a model is trained without its k strongest proponents, one without k random training
    examples (the same for all test examples), one without k random ones of its label (the same for all of that label),
    one without the k nearest by TF-IDF, and one on all. A change is always between two fits of the same seed. One seed
    alone proves nothing: removing 20 random examples once can look like a great effect.

    It takes (1 + n + 1 + labels + n) x seeds fits for n test examples, which is told before; what takes how long is
    told after the first. Random numbers of the caller stay as they are.

    Args:
        result: of ``trainer.influence``.
        build: ``build(indices, seed)`` returns a module, freshly initialised by the seed, and the loader of the
            training examples with these indices. It must train as the fit that was asked about did.
        test: the result's test examples, in a loader or a data set, with their labels; or several of these.
        k: how many training examples are left out.
        seeds: how many; each with other initial weights, another order of the examples, and other random removals.
        test_indices: which rows of the result; all by default.
        against: what the proponents are compared with: "random", "same label", "tf-idf", or several of these.
        trainer: a number of epochs, for a quiet trainer on one device; or a function that makes a new trainer for each
            fit. By default as many epochs as the trace has.
        folder: where retrainings are kept, so that a run that is broken off goes on, several processes share the work,
            and nothing is fitted twice; by default in a temporary one, which is removed.

    Raises:
        TypeError: if the result is none, if ``build`` takes or returns something else, or the test examples come in
            something else.
        ValueError: if the module, the training set or the test set is not that of the result, if there are fewer than
            ``k`` training examples left, or fewer than two seeds, if scores are the same for all training examples, or
            if what is trained on does not depend on the indices.

    Warns:
        UserWarning: if what is built does not depend on the seed, so that intervals have no width; if scores of some
            test examples are the same for all training examples; or if the training set, or the tokens of a test
            example, may be others than those of the result.
    """
    rows = checked_rows(result, test_indices)
    others = [against] if isinstance(against, str) else against
    _check_asked(result, others)
    k = number_removed(k, result.n_train - len(result.undrawn))
    seeds = whole_number("seeds", seeds, at_least=2, why=", as one says nothing of chance")
    require_proponents(result, rows, k)
    with ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="retrainings-"))
        fit = epochs_of(result.trace) if trainer is None else trainer
        runs = Retrainings(place, build, test, n_train=result.n_train, trainer=fit)
        module = runs.built_on_few[0]
        check_module(result.trace, module)
        require_same_test(result, runs.held_out, module)
        check_training_set(result.trace, runs.loader_of_all)
        if trainer is None and result.trace is not None and isinstance(fit, int):
            warn_of_other_steps(result.trace, module, runs.loader_of_all, fit)
        removals = Removals(result, rows, k, seeds, others)
        base = [Retraining(removals.drawn, seed) for seed in range(seeds)]
        asked = {
            name: [[removals.without(chosen, seed) for seed, chosen in enumerate(of_test)] for of_test in chosen]
            for name, chosen in removals.chosen.items()
        }
        wanted = [*base, *(each for of_name in asked.values() for of_test in of_name for each in of_test if each)]
        if result.target != "label":
            quantity_of(result, runs.run_each(wanted[:1]))  # refused after one fit, not after all
        found = dict(zip((each.key for each in wanted), runs.run_each(wanted), strict=True))
    notes = [*removals.notes, *notes_of_seeds([found[each.key] for each in base])]
    return _effect(result, rows, k, found, (base, asked), notes)


def _effect(
    result: InfluenceResult,
    rows: Tensor,
    k: int,
    found: dict[str, Outcome],
    asked: tuple[list[Retraining], dict[str, list[list[Retraining | None]]]],
    notes: Sequence[str],
) -> RemovalEffect:
    """What the retrainings come to: the base, and by what was left out those of each test example and seed."""
    base, of_names = asked
    quantity = quantity_of(result, found.values())
    before = torch.stack([values_of(result, rows, found[each.key], quantity) for each in base], 1)
    changes = {name: torch.full_like(before, torch.nan) for name in of_names}
    for name, of_tests in of_names.items():
        for place, of_seeds in enumerate(of_tests):
            for number, each in enumerate(of_seeds):
                if each is not None:
                    after = values_of(result, rows[place : place + 1], found[each.key], quantity)
                    changes[name][place, number] = after[0] - before[place, number]
    return RemovalEffect(
        k=k,
        seeds=tuple(each.seed for each in base),
        quantity=quantity,
        test_rows=rows,
        test_indices=result.test_indices[rows],
        targets=[target_name(result, int(row)) for row in rows],
        before=before,
        changes=changes,
        notes=notes,
    )


def _check_asked(result: InfluenceResult, against: Sequence[Baseline]) -> None:
    unknown = [each for each in against if each not in BASELINES]
    if unknown:
        raise ValueError(f"against must be of {', '.join(map(repr, BASELINES))}, but got {unknown[0]!r}.")
    if result.candidates:
        raise ValueError(
            "The result's training examples are candidates that the model was not trained on: nothing can be removed."
        )
