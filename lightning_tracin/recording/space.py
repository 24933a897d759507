"""What a fit will write, compared with what the disk holds."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import BatchSampler

from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.gradients.sites import words_site
from lightning_tracin.recording.first_batch import FirstBatch, bytes_per_example
from lightning_tracin.recording.plan import RecordingPlan
from lightning_tracin.storage.encoding import StorageOptions
from lightning_tracin.storage.recorded_checkpoint import frozen_names
from lightning_tracin.storage.runs import max_run_bytes


def require_space(
    trainer: pl.Trainer,
    plan: RecordingPlan,
    path: Path,
    state: Mapping[str, Any],
    first: FirstBatch,
    training_set: TrainingSet,
) -> None:
    """Check that the disk has room for what a fit will write: for the next checkpoint, and with a warning for all.

    Raises:
        OSError: if it has not enough for one; the message says how much is needed, and what would need less.
    """
    checkpoints = _expected_checkpoints(trainer, plan)
    frozen = frozen_names(first.gradients.module)
    once, weights = (
        sum(
            value.nbytes for name, value in state.items() if isinstance(value, Tensor) and (name in frozen) is is_frozen
        )
        for is_frozen in (True, False)
    )

    def needed(number: int, options: StorageOptions, cached: bool = True) -> float:
        drawn = min(1.0, _epochs_between(trainer, plan) * _drawn_in_epoch(trainer, training_set))
        one_pass = cached * bytes_per_example(first, options) * len(training_set) * drawn
        beside = 0.0  # what came since the last checkpoint
        if plan.cache == "training":
            passes = math.ceil(_epochs_between(trainer, plan)) * max(1.0, _drawn_in_epoch(trainer, training_set))
            beside = max_run_bytes(one_pass, passes, trainer.world_size)
        elif training_set.batches is not None:
            beside = one_pass  # which is sorted on disk
        return once + number * (weights + one_pass) + beside

    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    cached = plan.cache != "on_demand"
    if needed(checkpoints, plan.options, cached) <= free:
        return
    fitting = needed(1, plan.options, cached) <= free
    number = checkpoints if fitting else 1
    half = replace(plan.options, dtype="float16")
    smaller = {'dtype="float16"': half}
    if words_site(first.gradients.sites) is not None and plan.options.top_words is None:
        smaller['top_words=10 with dtype="float16"'] = replace(half, top_words=10)
    if not all(site.has_words for site in first.gradients.sites) and plan.options.projection is None:
        smaller['projection=(32, 128) with dtype="float16"'] = replace(half, projection=(32, 128))
    savers = [f"{name} would need {_size(needed(number, options))}" for name, options in smaller.items()]
    savers.append(f'cache="on_demand" {_size(needed(number, plan.options, cached=False))} until influence is asked for')
    need = (
        f"The trace in {path} needs about {_size(needed(number, plan.options, cached))} for "
        f"{number} checkpoint{'s' * (number > 1)} of {len(training_set)} training examples, but only "
        f"{_size(free)} are free"
    )
    less = f"{'; '.join(savers)}; a larger every_n_epochs, or fewer methods, less."
    if not fitting:
        raise OSError(errno.ENOSPC, f"{need}; nothing was written. {less}")
    goes_on = "the recording" if plan.on_error == "warn" else "the fit"
    rank_zero_warn(f"{need}. If the disk fills up, {goes_on} ends there, and what is stored stays complete. {less}")


def _epochs_between(trainer: pl.Trainer, plan: RecordingPlan) -> float:
    """How many epochs come between two checkpoints."""
    steps = plan.every_n_train_steps
    return plan.every_n_epochs if steps is None else steps / _steps_each(trainer)


def _drawn_in_epoch(trainer: pl.Trainer, training_set: TrainingSet) -> float:
    """How many examples the processes draw in an epoch, over the number of those that there are."""
    sampler = training_set.loader.sampler
    # A batch sampler of the user's own may draw anything.
    if not (isinstance(sampler, Sized) and isinstance(training_set.loader.batch_sampler, BatchSampler)):
        return 1.0
    return len(sampler) * trainer.world_size / len(training_set)


def _expected_checkpoints(trainer: pl.Trainer, plan: RecordingPlan) -> int:
    """How many checkpoints the fit has yet to take, at most; 1 if it has no end."""
    steps_each = _steps_each(trainer)
    last = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    epochs = last - trainer.current_epoch
    steps = math.inf if trainer.max_steps < 0 else trainer.max_steps - trainer.global_step
    if plan.every_n_train_steps is not None:
        checkpoints = min(steps, epochs * steps_each) / plan.every_n_train_steps
    else:
        begun = math.ceil(steps / steps_each) if steps < math.inf else math.inf
        checkpoints = min(epochs, begun) / plan.every_n_epochs
    return max(1, int(checkpoints)) if math.isfinite(checkpoints) else 1


def _steps_each(trainer: pl.Trainer) -> int:
    """How many optimizer steps an epoch has, as gradients are accumulated now."""
    return max(1, math.ceil(min(trainer.num_training_batches, 2**53) / trainer.accumulate_grad_batches))


def _size(n_bytes: float) -> str:
    return decimal(int(n_bytes))
