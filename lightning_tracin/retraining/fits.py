"""One fit on a part of the training set, without a trace in the process: what it takes, and what it leaves alone."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_tracin.bridge.compat import lightning_of, twin
from lightning_tracin.bridge.unmoved import random_state_kept
from lightning_tracin.checked_numbers import is_whole, whole_number

#: Makes a module, initialised by a seed, and a loader of the training examples with some indices, in their order.
Build: TypeAlias = Callable[[Sequence[int], int], tuple[pl.LightningModule, Any]]

#: How a fit runs: so many epochs by a trainer that is quiet, or by the trainer that a function makes anew.
Fit: TypeAlias = int | Callable[[], pl.Trainer]

#: A trainer's options, by which it writes and prints nothing, on one device.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "auto",
    "devices": 1,
}


def checked_fit(fit: Fit) -> Fit:
    """How fits are to run, checked before anything is.

    Raises:
        TypeError: if it is neither a number of epochs nor a function.
        ValueError: if there are no epochs.
    """
    if is_whole(fit):
        return whole_number("trainer", fit, allowed="a number of epochs")
    if not callable(fit) or isinstance(fit, type):
        raise TypeError(
            "trainer must be a number of epochs, or a function that makes a new trainer for each fit, as in "
            f"trainer=lambda: pl.Trainer(max_epochs=3), but got {type(fit).__name__}."
        )
    return fit


def built(build: Build, indices: Sequence[int], seed: int, n_train: int) -> tuple[pl.LightningModule, DataLoader[Any]]:
    """A module, and the loader of its training examples; random numbers come from the seed from here on.

    Raises:
        TypeError: if ``build`` takes or returns anything else.
        ValueError: if the loader does not give as many examples as there are indices.
    """
    pl.seed_everything(seed, verbose=False)
    try:
        made: Any = build(indices, seed)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # raised by the call itself
            raise TypeError(f"build must be a function of (indices, seed), but: {error}.") from error
        raise
    kinds = (pl.LightningModule, twin.LightningModule)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], kinds):
        got = f"({', '.join(type(each).__name__ for each in made)})" if isinstance(made, tuple) else type(made).__name__
        raise TypeError(f"build(indices, seed) must return (module, train_loader), but returned {got}.")
    module, loader = made
    if not isinstance(loader, DataLoader):
        raise TypeError(
            "build(indices, seed) must return a torch.utils.data.DataLoader beside the module, but returned "
            f"{type(loader).__name__}."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"The training set that build returned ({type(loader.dataset).__name__}) is a stream, whose examples have "
            "no indices. Use a map-style data set, such as torch.utils.data.Subset(data, indices)."
        )
    lengths = {len(each) for each in (loader.dataset, loader.sampler) if isinstance(each, Sized)}
    if lengths and len(indices) not in lengths:
        raise ValueError(
            f"build was given {len(indices)} of {n_train} indices, but its training loader gives "
            f"{' or '.join(map(str, sorted(lengths)))} examples: it must train on those with the indices, and on no "
            "others, as in DataLoader(torch.utils.data.Subset(data, indices), shuffle=True)."
        )
    return module, loader


def fitted(fit: Fit, module: pl.LightningModule, loader: DataLoader[Any]) -> pl.Trainer:
    """Fit a module, and return the trainer that did it.

    Raises:
        TypeError: if the function that was to make a trainer made none, or one of the other of Lightning's packages.
        ValueError: if the trainer works with several processes.
    """
    trainer = lightning_of(module).Trainer(max_epochs=fit, **QUIET) if isinstance(fit, int) else fit()
    if not isinstance(trainer, lightning_of(module).Trainer):
        raise TypeError(
            f"trainer() must return a {lightning_of(module).__name__}.Trainer, which the module belongs to, but "
            f"returned a {type(trainer).__module__}.{type(trainer).__name__}."
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"Each retraining runs in one process, but the trainer has {trainer.world_size}. Use devices=1, and start "
            "several processes on the same folder: each takes a retraining that no other one has."
        )
    trainer.fit(module, loader)
    return trainer  # type: ignore[no-any-return]


@contextmanager
def apart() -> Iterator[None]:
    """Run fits without a trace: random numbers, their seeds in the environment, and what Lightning logs."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    kept = {name: os.environ.get(name) for name in names}
    deterministic = torch.are_deterministic_algorithms_enabled()
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with random_state_kept(), warnings.catch_warnings():
            for package in ("pytorch_lightning", "lightning"):  # advice on workers and on what is not logged
                warnings.filterwarnings("ignore", module=rf"{package}\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        torch.use_deterministic_algorithms(deterministic)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def memory_freed() -> Iterator[Callable[[], int]]:
    """Yield what frees the memory of the last fit: a trainer and its module refer to each other, and stay otherwise.

    What was there before is not looked through each time, which would take as long as a small fit.
    """
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    try:
        yield gc.collect
    finally:
        if freezes:
            gc.unfreeze()
