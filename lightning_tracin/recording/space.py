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
from torch import Tensor

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
    """Check that the disk has room for all that a fit will write.

    Raises:
        OSError: if it has not; the message says how much is needed, and what would need less.
    """
    checkpoints = _expected_checkpoints(trainer, plan)
    frozen = frozen_names(first.gradients.module)
    once, weights = (
        sum(
            value.nbytes for name, value in state.items() if isinstance(value, Tensor) and (name in frozen) is is_frozen
        )
        for is_frozen in (True, False)
    )

    def needed(options: StorageOptions, cached: bool = True) -> float:
        one_pass = cached * bytes_per_example(first, options) * len(training_set)
        beside = 0.0  # what came since the last checkpoint
        if plan.cache == "training":
            beside = max_run_bytes(one_pass, _passes_between(trainer, plan, training_set), trainer.world_size)
        elif training_set.batches is not None:
            beside = one_pass  # which is sorted on disk
        return once + checkpoints * (weights + one_pass) + beside

    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    need = needed(plan.options, plan.cache != "on_demand")
    if need <= free:
        return
    half = replace(plan.options, dtype="float16")
    smaller = {'dtype="float16"': half}
    if words_site(first.gradients.sites) is not None and plan.options.top_words is None:
        smaller['top_words=10 with dtype="float16"'] = replace(half, top_words=10)
    if not all(site.has_words for site in first.gradients.sites) and plan.options.projection is None:
        smaller['projection=(32, 128) with dtype="float16"'] = replace(half, projection=(32, 128))
    savers = [f"{name} would need {_gigabytes(needed(options))}" for name, options in smaller.items()]
    savers.append(f'cache="on_demand" {_gigabytes(needed(plan.options, cached=False))} until influence is asked for')
    raise OSError(
        errno.ENOSPC,
        f"The trace in {path} needs about {_gigabytes(need)} for {checkpoints} checkpoints of {len(training_set)} "
        f"training examples, but only {_gigabytes(free)} are free; nothing was written. {'; '.join(savers)}; a "
        "larger every_n_epochs, or fewer methods, less.",
    )


def _passes_between(trainer: pl.Trainer, plan: RecordingPlan, training_set: TrainingSet) -> float:
    """How many examples come between two checkpoints, to all processes, over the number of those that there are."""
    epochs = plan.every_n_epochs
    if plan.every_n_train_steps is not None:
        epochs = math.ceil(plan.every_n_train_steps / _steps_each(trainer))
    sampler = training_set.loader.sampler
    drawn = len(sampler) if isinstance(sampler, Sized) else 0  # in each process; some samplers draw several times
    return epochs * max(1.0, drawn * trainer.world_size / len(training_set))


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


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
