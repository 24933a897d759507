"""Whether a result, a training set and a test set belong together: told before hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.results.rows import checked_row
from lightning_tracin.retraining.held_out import HeldOut
from lightning_tracin.retraining.targets import target_classes
from lightning_tracin.storage.checkpoint import require_weights
from lightning_tracin.storage.trace import Trace


def epochs_of(trace: Trace | None) -> int:
    """As many epochs as a trace has, for fits like the one that left it.

    Raises:
        ValueError: if there is no trace, or no checkpoint in it.

    Warns:
        UserWarning: if checkpoints are further apart than an epoch: of the last epochs there may be none.
    """
    checkpoints = [] if trace is None else trace.checkpoints
    if not checkpoints:
        raise ValueError(
            "It is not known how long the fit trained: there is no trace with checkpoints. Pass a number of epochs, or "
            "a function that makes a trainer, as trainer=...."
        )
    ends = [0, *(each.epoch + 1 for each in checkpoints)]
    apart = max(after - before for before, after in pairwise(ends))
    if apart > 1:
        rank_zero_warn(
            f"The trace's last checkpoint is of epoch {ends[-1]}, and checkpoints are up to {apart} epochs apart: the "
            f"fit may have trained longer than the {ends[-1]} epochs that are trained here. Pass the number of its "
            f"epochs, as trainer={ends[-1] + 1}.",
            category=UserWarning,
        )
    return ends[-1]


def warn_of_other_steps(trace: Trace, module: pl.LightningModule, loader: DataLoader[Any], n_epochs: int) -> None:
    """Warn if so many epochs are not the optimizer steps of the fit that left a trace.

    Args:
        trace: has checkpoints.
        module: what is trained anew; one that makes its steps by itself may make any number.
        loader: of all training examples.
        n_epochs: as many are trained.
    """
    fitted, trained = trace.checkpoints[-1].step, n_epochs * len(loader)
    if module.automatic_optimization and fitted != trained:
        rank_zero_warn(
            f"The fit made {fitted} steps up to the trace's last checkpoint, but a retraining on all examples makes "
            f"{trained}: it is another fit, and may tell of another model. Build loaders with its batch size, and "
            "pass a function that makes its trainer as trainer=..., with its accumulate_grad_batches, max_steps and "
            "limit_train_batches.",
            category=UserWarning,
        )


def require_result(result: Any) -> None:
    """Check that something is a result.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(result, InfluenceResult):
        got = f"{result!r}" if isinstance(result, (str, Path)) else type(result).__name__
        raise TypeError(
            f"result must be what trainer.influence(...) returned, but got {got}. One that was saved is read by "
            "InfluenceResult.load(path)."
        )


def require_trace(result: InfluenceResult) -> Trace:
    """The trace that a result was computed from.

    Raises:
        TypeError: if the result is none.
        ValueError: if it is not there, or has no weights.
    """
    require_result(result)
    if result.trace is None:
        raise ValueError(
            "The trace that the result was computed from is not there; it has the weights. Load the result with "
            "InfluenceResult.load(path, trace=...)."
        )
    require_weights(result.trace.checkpoints)
    return result.trace


def check_module(trace: Trace | None, module: pl.LightningModule) -> None:
    """Check that what is built has the parameters of the module that was trained.

    Args:
        trace: of the fit; None where it is not there.
        module: what is built.

    Raises:
        ValueError: if their names or shapes differ; the message lists some of them.
    """
    if trace is not None:
        module.configure_model()  # which builds layers late; it may be called again
        trace.check_model(module.state_dict(), type(module).__name__)


def require_proponents(result: InfluenceResult, rows: Tensor, k: int) -> None:
    """Check that scores tell which training examples are a test example's proponents; warn if not those of all.

    Where all scores are the same, or no score is positive and the k strongest are the same, the first k training
    examples of the data set would stand for proponents.

    Args:
        result: the result.
        rows: of it, of the test examples that count.
        k: how many proponents are meant.

    Raises:
        ValueError: if they tell it of no test example.
    """
    highest = result.proponents(min(k, result.n_train - len(result.undrawn))).values[rows]
    lowest = result.opponents(1).values[rows, 0]
    is_constant = (highest[:, 0] == lowest) | ((highest[:, 0] == highest[:, -1]) & (highest[:, 0] <= 0))
    n_constant = int(is_constant.sum())
    if not n_constant:
        return
    row = int(rows[is_constant][0])
    told = (
        f"{n_constant} of {len(rows)} test examples have no proponents: by {result.method} their {k} highest scores "
        "are the same, and not above the others, or not above 0 (all "
        f"{highest[is_constant][0, 0] + 0.0:g} for test example {int(result.test_indices[row])})."
    )
    if n_constant == len(rows):
        raise ValueError(
            f"{told} Ask by another method, or look at what this one leaves out (exclude_tokens), and at the learning "
            'rate, by which checkpoints count unless weights="equal".'
        )
    rank_zero_warn(f"{told} What is left out for them says nothing of the scores.", category=UserWarning)


def check_training_set(trace: Trace | None, loader: DataLoader[Any]) -> None:
    """Warn if training examples are others than those that a trace has scores of.

    Args:
        trace: of the scores; None where it is not there.
        loader: of all training examples, as they are built.

    Raises:
        ValueError: if there are fewer.
    """
    if trace is None:
        return
    try:
        fingerprint = TrainingSet(loader).fingerprint()
    except IndexError as error:
        raise ValueError(
            f"The scores are of {trace.n_train} training examples, but build gives no such number of them: {error}. "
            "Pass a result for the training set that build has."
        ) from error
    if fingerprint != trace.data_fingerprint:
        rank_zero_warn(
            f"build gives other training examples than those of the trace in {trace.path}, or the same in another "
            "form: where index i is another example here than there, retraining says nothing of the scores."
        )


def checked_rows(result: InfluenceResult, asked: Sequence[int] | None) -> Tensor:
    """The rows of a result that count, (n,) int64; all by default.

    Raises:
        TypeError: if the result is none.
        ValueError: if there is no such row, or one of these test examples has no target that is one class.
    """
    require_result(result)
    if asked is None:
        rows = torch.arange(len(result.test_indices))
    elif not len(asked):
        raise ValueError("test_indices is empty: there is no test example to look at.")
    else:
        try:
            rows = torch.tensor([checked_row(each, result.test_indices) for each in asked])
        except IndexError as error:
            raise ValueError(f"test_indices must be rows of the result. {error}") from error
    if result.target != "label" or bool((~result.test_texts.labels.isnan()).any()):
        target_classes(result, rows)  # before hours of training
    return rows


def number_removed(k: int, n_drawn: int) -> int:
    """How many training examples are left out, of which some must be left to train on.

    Args:
        k: what was asked for.
        n_drawn: how many training has drawn.

    Raises:
        ValueError: if it is no whole number, or too many.
    """
    return whole_number("k", k, 1, n_drawn - 1, why=f", as {n_drawn} examples were trained on")


def require_same_test(result: InfluenceResult, held_out: HeldOut, module: nn.Module) -> None:
    """Check that test examples are those of a result, as far as their number and labels tell; warn of other tokens.

    Args:
        result: the result.
        held_out: the test examples.
        module: finds the labels in their batches.

    Raises:
        ValueError: if they are others.
    """
    advice = "Pass the test examples that the result was computed for; test_indices=... chooses some of them."
    n_test = len(result.test_indices)
    if len(held_out) != n_test:
        raise ValueError(f"test has {len(held_out)} examples, but the result has {n_test}. {advice}")
    found, known = held_out.labels(module), result.test_texts.labels
    others = [] if found is None else (known.isfinite() & (known != found)).nonzero().flatten().tolist()
    if found is not None and others:
        raise ValueError(
            f"test is another one than the result's: {_test_example(result, others[0])} has the label "
            f"{float(found[others[0]]):g} here, and {known[others[0]].item():g} there. {advice}"
        )
    _warn_of_other_tokens(result, held_out)


def _warn_of_other_tokens(result: InfluenceResult, held_out: HeldOut) -> None:
    """A warning, as a module may read other token ids than those of the batch."""
    known = [set(ids) for ids in result.test_texts.ids_by_example()]
    other = _other_row(known, held_out.whole_numbers())
    if other is not None:
        name = _test_example(result, other).capitalize()
        rank_zero_warn(
            f"{name} has other tokens here than in the result. If test is another data set, or the same in another "
            "order, retraining says nothing of the scores."
        )


def _test_example(result: InfluenceResult, row: int) -> str:
    """The test example of a row, as it is named where results are shown."""
    index = int(result.test_indices[row])
    return f"test example {index}" if index == row else f"test example {index} (row {row} of the result)"


def _other_row(known: list[set[int]], found: list[set[int]]) -> int | None:
    """The first row that has tokens which are not among the numbers that were found there; None if there is none.

    A module reads tokens that are in no batch, such as the first one of a decoder: those that all rows have tell
    nothing. Of one row alone it is not known which these are, and it must have no number in common.
    """
    if len(known) == 1:
        return 0 if known[0] and found[0] and not known[0] & found[0] else None
    of_all = set.intersection(*known)
    pairs = enumerate(zip(known, found, strict=True))
    return next((row for row, (tokens, numbers) in pairs if numbers and not tokens - of_all <= numbers), None)
