"""What retrained modules say of the targets that a result explains: a probability, or where there is none, the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_tracin.gradients.targets import number_of_class
from lightning_tracin.results.reader import Reader
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.outcomes import Outcome

#: What is measured of a test example.
Quantity: TypeAlias = Literal["probability", "loss"]

_PAIR = ", not "  # between the two classes of a target's name, and perhaps in the names of classes


def common_quantity(outcomes: Iterable[Outcome]) -> Quantity:
    """What can be measured by all modules alike: a probability where each of them says classes, else the loss.

    Args:
        outcomes: what each module says that is compared with another one.
    """
    return "loss" if any(each.log_probabilities is None for each in outcomes) else "probability"


def quantity_of(result: InfluenceResult, outcomes: Iterable[Outcome]) -> Quantity:
    """What can be measured of a result's targets.

    Args:
        result: knows the targets.
        outcomes: what each module says that is compared with another one.

    Raises:
        ValueError: if the target is a class, but the module says none.
    """
    quantity = common_quantity(outcomes)
    if quantity == "loss" and result.target != "label":
        raise ValueError(
            f"target={result.target!r} is measured by the probability of a class, but these modules say no class of a "
            'test example. Ask for a result with target="label", whose loss is measured.'
        )
    return quantity


def values_of(result: InfluenceResult, rows: Tensor, outcome: Outcome, quantity: Quantity) -> Tensor:
    """(n,) the probabilities of the targets of some rows of a result; or their losses.

    Args:
        result: knows the targets.
        rows: (n,) of the result.
        outcome: what a module says of all of its test examples.
        quantity: which of the two, the same for all modules that are compared.
    """
    if quantity == "loss":
        return outcome.losses[rows]
    return log_probabilities_of(result, rows, outcome, quantity).exp()


def log_probabilities_of(result: InfluenceResult, rows: Tensor, outcome: Outcome, quantity: Quantity) -> Tensor:
    """(n,) the log probabilities of the targets of some rows of a result; where no class is said, minus their losses.

    A pair of classes counts by the probability of the first where it is one of the two.

    Args:
        result: knows the targets.
        rows: (n,) of the result.
        outcome: what a module says of all of its test examples.
        quantity: "loss" where a module that is compared with this one says no class.
    """
    if quantity == "loss" or outcome.log_probabilities is None:
        return -outcome.losses[rows]
    said = outcome.log_probabilities[rows].gather(1, target_classes(result, rows))
    return said[:, 0] - said.logsumexp(1) if said.shape[1] > 1 else said[:, 0]


def target_classes(result: InfluenceResult, rows: Tensor | None = None) -> Tensor:
    """(n, 1) int64, the class that each of some rows of a result explains, by default of all; of a pair (n, 2).

    Raises:
        ValueError: if one of these test examples has no label, or prediction, that is one class.
    """
    chosen = torch.arange(len(result.test_indices)) if rows is None else rows
    if result.target in ("label", "prediction"):
        of_each = (result.test_texts.labels if result.target == "label" else result.predictions[:, 0])[chosen]
        if bool(of_each.isnan().any()):
            bad = int(chosen[of_each.isnan()][0])
            raise ValueError(f"Test example {int(result.test_indices[bad])} has no {result.target} that is one class.")
        return of_each.long()[:, None]
    numbers = result.target_classes or _classes_named(result)
    return torch.tensor([numbers]).expand(len(chosen), -1)


def _classes_named(result: InfluenceResult) -> list[int]:
    """The class, or the two, that the target of an older file names, which has their text alone.

    Raises:
        ValueError: if there are no such classes, or if it may be others.
    """
    parts = result.target.split(_PAIR)
    pairs = [[_PAIR.join(parts[:at]), _PAIR.join(parts[at:])] for at in range(1, len(parts))]
    known = {*result.label_names.values()}
    found = [names for names in ([result.target], *pairs) if all(each in known or each.isdecimal() for each in names)]
    if len(found) > 1:
        raise ValueError(
            f"target={result.target!r} may be {' or '.join(map(repr, found))}, which this older result does not tell. "
            "Ask trainer.influence again."
        )
    return [number_of_class(each, result.label_names) for each in (found[0] if found else [result.target])]


def target_name(result: InfluenceResult, row: int) -> str:
    """What to print for the target of a row."""
    if result.target_names:
        return result.target_names[row]
    return Reader({}, result.label_names).label(result.test_texts.label_of(row)) or "its label"
