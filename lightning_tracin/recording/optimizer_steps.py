"""The optimizer steps of a fit, each noticed when it is made, also those that Lightning does not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tracin.bridge.compat import learns_nothing


class OptimizerSteps:
    """Notices each optimizer step when it is made: no hook comes later, and no scheduler has moved yet.

    Lightning's ``on_before_optimizer_step`` comes earlier: other callbacks, the module and its gradient clipping may
    still change rates and gradients after it, and a loss scaler may skip the step. It calls no hook for, and does not
    count, the steps of ``self.optimizers(use_pl_optimizer=False)`` in manual optimization.

    Args:
        trainer: whose fit it is.
        n_uncounted: how many steps Lightning had not counted before, in a fit that is resumed.

    Attributes:
        n_uncounted: how many steps it has not counted.
        announced: whether Lightning was about to make one at all.
    """

    def __init__(self, trainer: pl.Trainer, n_uncounted: int) -> None:
        self.n_uncounted = n_uncounted
        self.announced = False
        self._trainer = trainer
        self._note: Callable[[pl.Trainer, Optimizer], None] | None = None
        self._announced_at: dict[int, int] = {}
        self._under_way: set[int] = set()
        self._hooks: dict[int, list[RemovableHandle]] = {}

    def watch(self, note: Callable[[pl.Trainer, Optimizer], None]) -> None:
        """Begin to notice: ``note`` is called with the trainer and the optimizer after each step; it must not raise."""
        self._note = note
        for each in self._trainer.optimizers:
            self._watch(each)

    def announce(self, optimizer: Any) -> bool:
        """Lightning is about to make, and to count, a step of an optimizer.

        Returns:
            Whether it will be noticed; one that is not torch's has no hooks.
        """
        self.announced = True
        self._announced_at[id(optimizer)] = self._trainer.global_step
        if id(optimizer) not in self._hooks and self._watch(optimizer):  # given to the trainer during the fit
            self._under_way.add(id(optimizer))
        return id(optimizer) in self._hooks

    def close(self) -> None:
        """Leave the optimizers."""
        for hook in (hook for hooks in self._hooks.values() for hook in hooks):
            hook.remove()
        self._hooks.clear()

    def _watch(self, optimizer: Any) -> bool:
        if isinstance(optimizer, Optimizer):
            hooks = [
                optimizer.register_step_pre_hook(self._step_begins),
                optimizer.register_step_post_hook(self._step_made),
            ]
            self._hooks[id(optimizer)] = hooks
        return isinstance(optimizer, Optimizer)

    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._under_way.add(id(optimizer))

    def _step_made(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._under_way:  # torch tells twice of a step that calls that of its base class
            return
        self._under_way.remove(id(optimizer))
        if learns_nothing(self._trainer) or _skipped(optimizer):
            return
        assert self._note is not None
        self._note(self._trainer, optimizer)
        announced = self._announced_at.get(id(optimizer)) == self._trainer.global_step
        if not announced and not self._trainer.lightning_module.automatic_optimization:
            self.n_uncounted += 1


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has left all weights where they are, as the loss scaler had told it to."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf.any())
