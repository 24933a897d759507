"""A question leaves the process as it was: its random generators, what the trainer has logged, a fit that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl

from lightning_tracin.bridge.compat import metrics_kept
from lightning_tracin.bridge.unmoved import random_state_kept
from lightning_tracin.gradients.precision import without_autocast


def require_idle(trainer: pl.Trainer) -> None:
    """Check that nothing of the trainer's is running, which would not survive that it predicts in between.

    Raises:
        ValueError: if its fit, validation, test or prediction is running.
    """
    # Not by trainer.training and its like: a fit that was stopped by hand in a notebook leaves those as they were.
    if trainer.state.fn is not None and trainer.state.status.value == "running":
        name = trainer.state.fn.value
        raise ValueError(
            f"This trainer is in the middle of trainer.{name}(), which a query would break: it runs the model at other "
            f"weights, by the same trainer. Ask for influence after trainer.{name}() has returned, not in a hook or a "
            "step; TracInCallback(log_examples=...) explains examples during a fit."
        )


@contextmanager
def left_as_found(trainer: pl.Trainer) -> Iterator[None]:
    """Give back what a query takes: random numbers of Python, numpy and torch, and the metrics that a trainer holds.

    The module computes in the trainer's precision, whatever the caller's autocast says, and scores in float32.
    """
    with random_state_kept(), metrics_kept(trainer), without_autocast():
        yield
