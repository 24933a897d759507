"""Whether a result, a training set and a test set belong together: told before hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.held_out import HeldOut
from lightning_tracin.retraining.targets import target_classes
from lightning_tracin.storage.checkpoint import require_weights
from lightning_tracin.storage.trace import Trace


def epochs_of(trace: Trace | None) -> int:
    """As many epochs as a trace has, for fits like the one that left it.

    Raises:
        ValueError: if there is no trace, or no checkpoint in it.
    """
    checkpoints = [] if trace is None else trace.checkpoints
    if not checkpoints:
        raise ValueError(
            "It is not known how long the fit trained: there is no trace with checkpoints. Pass a number of epochs, or "
            "a function that makes a trainer, as trainer=...."
        )
    return checkpoints[-1].epoch + 1


def require_trace(result: InfluenceResult) -> Trace:
    """The trace that a result was computed from.

    Raises:
        ValueError: if it is not there, or has no weights.
    """
    if result.trace is None:
        raise ValueError(
            "The trace that the result was computed from is not there; it has the weights. Load the result with "
            "InfluenceResult.load(path, trace=...)."
        )
    require_weights(result.trace.checkpoints)
    return result.trace


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
        ValueError: if there is no such row, or a test example has no target that is one class.
    """
    n_test = len(result.test_indices)
    rows = torch.arange(n_test) if asked is None else torch.as_tensor(asked, dtype=torch.long).reshape(-1)
    bad = rows[(rows < 0) | (rows >= n_test)]
    if len(bad) or not len(rows):
        raise ValueError(
            f"test_indices must be rows of the result, from 0 to {n_test - 1}, but got {int(bad[0])}."
            if len(bad)
            else "test_indices is empty: there is no test example to look at."
        )
    if result.target != "label" or bool((~result.test_texts.labels.isnan()).any()):
        target_classes(result)  # before hours of training
    return rows


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
            f"test is another one than the result's: test example {others[0]} has the label "
            f"{float(found[others[0]]):g} here, and {known[others[0]].item():g} there. {advice}"
        )
    _warn_of_other_tokens(result, held_out)


def _warn_of_other_tokens(result: InfluenceResult, held_out: HeldOut) -> None:
    """A warning, as a module may read other token ids than those of the batch."""
    pairs = zip(result.test_texts.ids_by_example(), held_out.token_ids() or [], strict=False)
    other = next((place for place, (known, found) in enumerate(pairs) if not set(known) <= set(found)), None)
    if other is not None:
        rank_zero_warn(
            f"Test example {other} has other tokens here than in the result. If test is another data set, or the same "
            "in another order, retraining says nothing of the scores."
        )
