"""Optimizer steps that Lightning does not see: those of ``self.optimizers(use_pl_optimizer=False)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tracin.bridge.compat import learns_nothing


class RawSteps:
    """Notices, in manual optimization, the steps that Lightning calls no hook for and does not count.

    Args:
        trainer: whose fit it is.
        n_before: how many there were before, in a fit that is resumed.

    Attributes:
        n_steps: how many there were.
    """

    def __init__(self, trainer: pl.Trainer, n_before: int) -> None:
        self.n_steps = n_before
        self._trainer = trainer
        self._told: set[int] = set()
        self._hooks: list[RemovableHandle] = []

    def watch(self, note: Callable[[pl.Trainer, Optimizer], None]) -> None:
        """Begin to notice: ``note`` is called with the trainer and the optimizer after each such step."""

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if id(optimizer) in self._told:
                self._told.remove(id(optimizer))
            elif not learns_nothing(self._trainer):
                note(self._trainer, optimizer)
                self.n_steps += 1

        if not self._trainer.lightning_module.automatic_optimization:
            optimizers = [each for each in self._trainer.optimizers if isinstance(each, Optimizer)]
            self._hooks = [each.register_step_post_hook(stepped) for each in optimizers]

    def told_of(self, optimizer: Any) -> None:
        """Lightning has told of the step that an optimizer is about to make."""
        self._told.add(id(getattr(optimizer, "optimizer", optimizer)))

    def close(self) -> None:
        """Leave the optimizers."""
        for hook in self._hooks:
            hook.remove()
