"""Reading data sets and running modules without a trace in training: whatever we move is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng

from lightning_tracin.bridge.held_states import Held

# What a loader uses in the process that iterates it. Its own iterator is never ours.
_OF_LOADERS = ("dataset", "collate_fn", "worker_init_fn", "sampler", "batch_sampler", "generator")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back what is drawn from the generators of Python, numpy and torch, also after an error."""
    # A CUDA that nobody has begun to use is not begun here: processes could not be forked any more.
    kept = isolate_rng(include_cuda=torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        kept.__enter__()
        stack.callback(kept.__exit__, None, None, None)  # told of an error, it would not give them back
        yield


@contextmanager
def unmoved(*loaders: Any) -> Iterator[None]:
    """Read what loaders load: their data sets, collate functions and samplers are put back as they are now.

    Enter it wherever data are read in the process of a fit, beside :func:`random_state_kept`. What it cannot find is
    told by :meth:`~lightning_tracin.bridge.training_set.TrainingSet.warn_of_unseen`.

    Args:
        loaders: data loaders, or what stands in the place of one.
    """
    things = [loader for loader in loaders if not hasattr(loader, "dataset")]
    for loader in loaders:
        things += [_of_user(getattr(loader, name, None)) for name in _OF_LOADERS]
    held = Held(*things)
    try:
        yield
    finally:
        held.put_back()


@contextmanager
def module_unmoved(
    module: pl.LightningModule, datamodule: Any = None, trainer: pl.Trainer | None = None
) -> Iterator[None]:
    """Run a module's losses and batch hooks: buffers, metrics, attributes and what it logs stay as they are now.

    Args:
        module: the module.
        datamodule: whose batch hooks run, if any.
        trainer: whose learning rates and schedulers stay as they are, too: a ``training_step`` may move them.
    """
    schedules = [each.scheduler for each in trainer.lr_scheduler_configs] if trainer else []
    held = Held(module, datamodule, trainer and trainer.optimizers, schedules, computed=True)
    attributes: dict[str, Any] = module.__dict__
    own: dict[str, Any] = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    try:
        attributes |= {"log": _nothing, "log_dict": _nothing}
        yield
    finally:
        for name in ("log", "log_dict"):
            attributes.pop(name, None)
        attributes.update(own)
        held.put_back()


def _of_user(part: Any) -> Any:
    """A part of a loader, or what ours stands in the place of."""
    while type(part).__module__.startswith("lightning_tracin."):
        part = getattr(part, "own", None)
    return part


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for ``log``: what our passes compute is no value of training."""
