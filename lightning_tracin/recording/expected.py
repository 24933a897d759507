"""What a fit that is about to begin will come to: its checkpoints, and what training draws before each."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler

from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.recording.plan import RecordingPlan


@dataclass(frozen=True)
class Expected:
    """What a fit will come to.

    Attributes:
        checkpoints: how many it has yet to take, at most; None if it has no end.
        epochs: how many come between two checkpoints.
        draws: how many examples all processes draw in an epoch, repeated ones too, over those that the data set holds.
        drawn: the share of the data set that is drawn before a checkpoint.
        ever: the share of it that is drawn in many epochs.
    """

    checkpoints: int | None
    epochs: float
    draws: float
    drawn: float
    ever: float

    @property
    def drawn_in_the_middle(self) -> float:
        """The share of the data set that was drawn when half of the checkpoints are there."""
        return min(self.ever, self.drawn * ((self.checkpoints or 1) + 1) / 2)

    @property
    def drawn_in_all(self) -> float:
        """The share of the data set that was drawn when all of them are."""
        return min(self.ever, self.drawn * (self.checkpoints or math.inf))


def expected_of(trainer: pl.Trainer, plan: RecordingPlan, training_set: TrainingSet) -> Expected:
    """What a fit that is about to begin will come to."""
    every = plan.every_n_train_steps
    epochs = plan.every_n_epochs if every is None else every / _steps_each(trainer)
    draws, ever = _draws_in_epoch(trainer, training_set), _share_ever_drawn(trainer, training_set)
    sampler = _sampler(training_set.loader)
    if training_set.iterable:  # of which all examples count
        drawn = ever
    elif getattr(sampler, "replacement", False):
        drawn = ever * -math.expm1(-epochs * draws / ever)
    elif epochs <= 1 or not _is_shuffled(sampler):
        drawn = min(ever, min(epochs, 1) * draws)
    else:
        drawn = ever * (1 - (1 - min(1.0, draws / ever)) ** epochs)
    return Expected(_checkpoints(trainer, plan), epochs, draws, drawn, ever)


def _draws_in_epoch(trainer: pl.Trainer, training_set: TrainingSet) -> float:
    """How many examples the processes draw in an epoch, over the number of those that there are."""
    loader, sampler = training_set.loader, _sampler(training_set.loader)
    size = loader.batch_size or getattr(_composer(loader), "batch_size", None)
    if not isinstance(size, int):  # a batch sampler of the user's own may draw anything
        return min(1.0, trainer.num_training_batches / max(1, len(loader)))
    at_most = len(sampler) if isinstance(sampler, Sized) else math.inf
    draws = min(at_most, trainer.num_training_batches * size) * trainer.world_size / len(training_set)
    return draws if math.isfinite(draws) else 1.0


def _share_ever_drawn(trainer: pl.Trainer, training_set: TrainingSet) -> float:
    """The share of the data set that a sampler may draw."""
    sampler = _sampler(training_set.loader)
    if isinstance(sampler, SubsetRandomSampler):
        return min(1.0, len(sampler.indices) * trainer.world_size / len(training_set))
    if _is_shuffled(sampler) or getattr(sampler, "replacement", False) or training_set.iterable:
        return 1.0
    return min(1.0, _draws_in_epoch(trainer, training_set))


def _composer(loader: DataLoader[Any]) -> Any:
    """What composes a loader's batches."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _sampler(loader: DataLoader[Any]) -> Any:
    """What draws single examples for a loader's batches; None if that is not known."""
    return loader.sampler if loader.batch_size else getattr(_composer(loader), "sampler", None)


def _is_shuffled(sampler: Any) -> bool:
    """Whether a sampler may draw other examples in another epoch that ends early."""
    if isinstance(sampler, DistributedSampler):
        return bool(sampler.shuffle)
    return isinstance(sampler, (RandomSampler, SubsetRandomSampler))


def _checkpoints(trainer: pl.Trainer, plan: RecordingPlan) -> int | None:
    """How many checkpoints the fit has yet to take, at most; None if it has no end."""
    steps_each = _steps_each(trainer)
    last = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    steps = math.inf if trainer.max_steps < 0 else trainer.max_steps - trainer.global_step
    if plan.every_n_train_steps is not None:
        done, every = trainer.global_step, plan.every_n_train_steps
        end = done + min(steps, (last - trainer.current_epoch) * steps_each)
    else:
        done, every = trainer.current_epoch, plan.every_n_epochs
        end = min(last, done + (math.ceil(steps / steps_each) if steps < math.inf else math.inf))
    return max(1, int(end // every - done // every)) if math.isfinite(end) else None


def _steps_each(trainer: pl.Trainer) -> int:
    """How many optimizer steps an epoch has, as gradients are accumulated now."""
    return max(1, math.ceil(min(trainer.num_training_batches, 2**53) / trainer.accumulate_grad_batches))
