"""Questions about the training examples alone: what they leave open, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_tracin.bridge.queries import weights_kept
from lightning_tracin.bridge.strategy import launched
from lightning_tracin.querying.asked import (
    attached_datamodule,
    datamodule_asked,
    given_module,
    spread_weights,
    trace_asked,
    usable_module,
)
from lightning_tracin.querying.chosen_checkpoints import CheckpointChoice
from lightning_tracin.querying.filling import looked_up, ready_checkpoints
from lightning_tracin.querying.passes import Query
from lightning_tracin.querying.undisturbed import require_idle
from lightning_tracin.scoring.methods import Method
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.trace import Trace


@dataclass(frozen=True)
class Training:
    """What was passed to tell of a training; each is found where it is None, as for :func:`influence`.

    Attributes:
        model: the trained module, needed only where gradients are not stored yet.
        datamodule: gives ``train_dataloader`` where no loader is passed.
        train_dataloaders: one loader of the training set, or a datamodule.
        trace: what the fit recorded, or its folder.
        checkpoints: which of the trace's count.
    """

    model: pl.LightningModule | None
    datamodule: pl.LightningDataModule | None
    train_dataloaders: Any
    trace: str | Path | Trace | None
    checkpoints: CheckpointChoice


def ready_training(trainer: pl.Trainer, method: Method, training: Training) -> tuple[Query, Sequence[Checkpoint]]:
    """A query without test examples, and the checkpoints with the training gradients that the method needs.

    Args:
        trainer: computes those that are not stored yet.
        method: what is asked.
        training: what was passed.

    Raises:
        ValueError: if model or training set are missing or not those of the trace, if the method names words that the
            trace does not have, or if the trainer is in the middle of a fit.
        BlockingIOError: if gradients are missing, and a fit or another query is writing into the trace.
    """
    require_idle(trainer)
    datamodule, _, train_dataloaders = datamodule_asked(training.datamodule, None, training.train_dataloaders)
    processes = launched(trainer)
    module = given_module(trainer, training.model, train_dataloaders) or trainer.lightning_module
    with processes.synchronized():
        opened = trace_asked(trainer, training.trace)
        module = None if module is None else usable_module(trainer, module)
    if module is not None:
        spread_weights(trainer, module, [], datamodule)
    hooks = datamodule or (None if module is None else attached_datamodule(trainer, module))
    query = Query(trainer, module, opened, method, hooks, processes, training.checkpoints)
    with weights_kept(module) if module is not None else nullcontext():
        ready = ready_checkpoints(query, module, datamodule, train_dataloaders)
    return looked_up(query, ready), ready
