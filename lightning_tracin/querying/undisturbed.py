"""A question leaves the process as it was: its random generators, what the trainer has logged, a fit that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_tracin.bridge.compat import metrics_kept
from lightning_tracin.bridge.mixin import tokenizer_of
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
    Nothing is logged: a logger that ``predict`` begins would begin a run, or, as CSVLogger does, empty that of the fit.
    """
    with random_state_kept(), metrics_kept(trainer), without_autocast(), _loggers_unused(trainer):
        yield


@contextmanager
def tokenizer_lent(module: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> Iterator[None]:
    """Let a module have the tokenizer of its datamodule, which in a new process no fit has attached to it."""
    tokenizer = tokenizer_of(datamodule)
    if tokenizer is None or hasattr(module, "tokenizer"):
        yield
        return
    object.__setattr__(module, "tokenizer", tokenizer)
    try:
        yield
    finally:
        object.__delattr__(module, "tokenizer")


@contextmanager
def _loggers_unused(trainer: pl.Trainer) -> Iterator[None]:
    """Put loggers that do nothing in the place of a trainer's."""
    own = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in own]
    try:
        yield
    finally:
        trainer.loggers = own
