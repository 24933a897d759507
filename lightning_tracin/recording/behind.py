"""A place behind ModelCheckpoint, at the end of an epoch and of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from lightning_tracin.bridge.compat import DualCheckpoint


class BehindModelCheckpoint(DualCheckpoint):
    """Joins a trainer's callbacks for a fit, and acts when ModelCheckpoint has: a fit killed there has saved its epoch.

    Lightning calls what it takes for a kind of ModelCheckpoint after all others, in the order of the list.

    Args:
        trainer: whose fit it is; one that has a ModelCheckpoint.
        act: what is done.
    """

    def __init__(self, trainer: pl.Trainer, act: Callable[[pl.Trainer], None]) -> None:
        self._act = act
        trainer.callbacks = [*trainer.callbacks, self]  # type: ignore[attr-defined]

    def leave(self, trainer: pl.Trainer) -> None:
        """Leave the trainer's callbacks."""
        trainer.callbacks = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Act."""
        self._act(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act."""
        self._act(trainer)
