"""The optimizer steps of a fit, each noticed when it is made, also those that Lightning does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tracin.bridge.compat import learns_nothing
from lightning_tracin.gradients.layers import SiteLayers
from lightning_tracin.parallel.fsdp import is_fsdp


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


def unmoved_by(optimizer: Optimizer, sites: Sequence[SiteLayers], module: nn.Module) -> list[str]:
    """The keys of the sites whose weights an optimizer has, but leaves where they are, as they have no gradient.

    Under FSDP a process may have no part of a weight, and so no gradient: nothing is concluded there.

    Args:
        optimizer: that makes a step.
        sites: each with its layers.
        module: that is trained.
    """
    if is_fsdp(module):
        return []
    parameters = {each.site.key: [own for layer in each.layers for own in layer.parameters()] for each in sites}
    if all(parameter.grad is not None for each in parameters.values() for parameter in each):
        return []  # nearly always, so that the optimizer's parameters need not be gone through
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    own = {key: [parameter for parameter in each if parameter in owned] for key, each in parameters.items()}
    return [key for key, each in own.items() if each and all(parameter.grad is None for parameter in each)]


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has left all weights where they are, as the loss scaler had told it to."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf.any())
