"""A trace of a run that is over: all checks that can be made on a first batch, and the checkpoints written into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_tracin.bridge.collated_order import check_order
from lightning_tracin.bridge.compat import DATAMODULES, DualCallback, at_step, configured_optimizers, lightning_of
from lightning_tracin.bridge.own_batches import own_batch_sampler
from lightning_tracin.bridge.queries import weights_kept
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.bridge.unmoved import module_unmoved, unmoved
from lightning_tracin.checked_numbers import real_numbers
from lightning_tracin.gradients.printable import storable
from lightning_tracin.parallel.fsdp import full_state_dict
from lightning_tracin.parallel.processes import ALONE
from lightning_tracin.past.checkpoints import PastCheckpoint, first_line, in_order, read_checkpoint
from lightning_tracin.past.known import KnownRun
from lightning_tracin.past.rates import Configured
from lightning_tracin.past.trainer_folder import read_folder
from lightning_tracin.querying.asked import given_module, loader_of_datamodule
from lightning_tracin.querying.passes import predict_by
from lightning_tracin.querying.undisturbed import left_as_found
from lightning_tracin.recording.first_batch import FirstBatch, layer_sizes, look_at_first_batch, stored_sites
from lightning_tracin.recording.plan import component_numbers, local_path, methods_to_record
from lightning_tracin.storage.assembled_trace import assembled_trace
from lightning_tracin.storage.encoding import StorageOptions
from lightning_tracin.storage.layouts import model_fingerprint
from lightning_tracin.storage.lock import locked
from lightning_tracin.storage.own_files import has_trace, require_free
from lightning_tracin.storage.sampled_moments import require_readable_apart
from lightning_tracin.storage.schemas import TraceHeader
from lightning_tracin.storage.shards import fitting_shard_examples
from lightning_tracin.storage.trace import Trace

_OPTIONS = StorageOptions("float16")  # as TracInCallback's by default

_RATES = {"at_least": 0, "at_most": 1e30}  # the most as of schemas.Rate


def begin_past(
    path: str | Path,
    checkpoints: Any,
    model: Any,
    train_dataloaders: Any,
    learning_rates: Sequence[float] | None,
    methods: Sequence[str],
    *,
    rank: tuple[int, int] | None = None,
) -> Trace:
    """Make a trace of a run that is over; see :meth:`~lightning_tracin.past.trace.Trace.from_checkpoints`."""
    folder = local_path(path, "path of a trace")
    asked, options = methods_to_record(methods), replace(_OPTIONS, rank=component_numbers(rank))
    rates = None if learning_rates is None else real_numbers("learning_rates", learning_rates, **_RATES)
    single = isinstance(checkpoints, (str, Path, Trace)) or hasattr(checkpoints, "keys")
    sources = [checkpoints] if single else list(checkpoints)
    with locked(folder):
        require_free(folder)
        if has_trace(folder):
            raise FileExistsError(
                f"{folder.absolute()} holds a trace already, which may be asked as it is: Trace({str(path)!r}). Remove "
                "it, or pass another folder."
            )
        read = [each for at, source in enumerate(sources) for each in read_checkpoint(source, at, read_folder)]
        found = in_order(read, rates)
        module = given_module(None, model, train_dataloaders)
        if not hasattr(module, "configure_optimizers"):
            raise TypeError(
                "model must be the LightningModule that was trained, or a Hugging Face model, but got "
                f"{type(model).__name__}."
            )
        assert module is not None
        trainer = _trainer(module, found)
        with left_as_found(trainer), weights_kept(module), _device_kept(module):
            return _begun(folder, trainer, module, found, train_dataloaders, (asked, options))


def _begun(
    folder: Path,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    found: Sequence[PastCheckpoint],
    train_dataloaders: Any,
    asked: tuple[Sequence[str], StorageOptions],
) -> Trace:
    """Check all that can be checked, and write the trace of the methods that are asked for, as options say."""
    methods, options = asked
    datamodule: Any = train_dataloaders if isinstance(train_dataloaders, DATAMODULES) else None
    if datamodule is not None:
        train_dataloaders = loader_of_datamodule(trainer, datamodule, "train", ALONE)
    module.configure_model()  # a new module has yet to build its layers; it may be called again
    training_set = TrainingSet(train_dataloaders)
    if options.rank is not None:
        require_readable_apart(training_set)
    with unmoved(training_set.loader):
        fingerprint = training_set.fingerprint()
        check_order(training_set.loader, "training", training_set.looked)
        run, first = _looked_at(trainer, module, datamodule, found, training_set, methods)
    source = None if found[0].recorded is None else Trace(found[0].recorded.trace_path)
    is_own = source is None or (source.n_train, source.data_fingerprint) == (len(training_set), fingerprint)
    drawable, doubt = _drawable(training_set)
    doubts = [*run.notes, *([doubt] if doubt and source is None else [])]
    for note in doubts:
        rank_zero_warn(note)
    notes = doubts if source is None else [*source.header.notes, *doubts]
    if source is not None and source.incomplete is not None:
        notes.append(f"The trace of these checkpoints is incomplete. {source.incomplete} Scores lack what came later.")
    sizes = layer_sizes(first, training_set)
    per_example = sum(options.nbytes(size) for size in sizes.values())
    header = TraceHeader(
        n_train=len(training_set),
        data_fingerprint=fingerprint,
        model_fingerprint=model_fingerprint(full_state_dict(module)),
        model_class=type(module).__name__,
        sites=stored_sites(first, options, sizes),
        dtype=options.dtype,
        shard_examples=fitting_shard_examples(per_example, len(training_set)),
        candidates=not is_own or (source is not None and source.header.candidates),
        notes=tuple(storable(note) for note in notes),
    )
    drawn = [drawable if each.recorded is None or not is_own else each.recorded.drawn() for each in found]
    return assembled_trace(folder, header, run.known(header.sites, drawn))


def _looked_at(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    found: Sequence[PastCheckpoint],
    training_set: TrainingSet,
    methods: Sequence[str],
) -> tuple[KnownRun, FirstBatch]:
    """What the checkpoints tell of the module, and what a first batch does at the weights of the last one."""
    looked: list[tuple[KnownRun, FirstBatch]] = []
    at = f"at the weights of {found[-1].name}"
    trains = type(module).training_step is not lightning_of(module).LightningModule.training_step

    def look() -> None:
        with module_unmoved(module, datamodule):
            configured = _configured(module)
        run = KnownRun.of(module, found, configured)
        run.load(len(found) - 1)
        with at_step(trainer, found[-1].number, found[-1].epoch):
            looked.append((run, look_at_first_batch(trainer, module, training_set, methods, compared=trains, at=at)))

    few = training_set.loader_over(training_set.first_indices[:1])
    predict_by(_nothing, trainer, module, few, datamodule, callbacks=[_AtStart(look)])
    return looked[0]


@contextmanager
def _device_kept(module: pl.LightningModule) -> Iterator[None]:
    """Leave a module on the device that it was on; Lightning leaves it on the CPU."""
    device = _device_of(module)
    try:
        yield
    finally:
        module.to(device)


def _device_of(module: pl.LightningModule) -> torch.device:
    return next((each.device for each in module.parameters()), torch.device("cpu"))


class _AtStart(DualCallback):
    """Calls a function where Lightning has set up a module, its trainer and its device as for a fit."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call it."""
        self._act()


def _nothing(batch: Any, batch_idx: int) -> tuple[()]:
    """Stands in for ``predict_step``, of which Lightning warns if it returns None."""
    return ()


def _trainer(module: pl.LightningModule, checkpoints: Sequence[PastCheckpoint]) -> pl.Trainer:
    """A trainer of the module's package that runs where the module is, and tells the length of the run that is over."""
    package: Any = lightning_of(module)
    device = _device_of(module)
    n_steps = checkpoints[-1].number

    class PastTrainer(package.Trainer):  # type: ignore[misc]
        @property
        def estimated_stepping_batches(self) -> int:  # schedules are made of it
            return n_steps

    return PastTrainer(
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        max_epochs=checkpoints[-1].epoch + 1,
        limit_predict_batches=1,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _configured(module: pl.LightningModule) -> Configured | str:
    """The optimizers and schedulers that a module makes, or why it makes none."""
    name = type(module).__name__
    if type(module).configure_optimizers is lightning_of(module).LightningModule.configure_optimizers:
        return f"{name} has no configure_optimizers, which would tell how its optimizers were made"
    try:
        optimizers, schedulers = configured_optimizers(module)
    except Exception as error:  # it may need what only a fit sets up
        return f"configure_optimizers of {name} raises {type(error).__name__}: {first_line(error)}"
    by_hand = type(module).optimizer_step is not lightning_of(module).LightningModule.optimizer_step
    return Configured(optimizers, schedulers, module.automatic_optimization, by_hand)


def _drawable(training_set: TrainingSet) -> tuple[Tensor | None, str | None]:
    """(n_train,) bool, the examples that a loader's sampler can draw, None for all; and what is not known of it."""
    loader: Any = training_set.loader
    if training_set.iterable:
        return None, None
    sampler, n_train = loader.sampler, len(training_set)
    sampler = sampler.sampler if isinstance(sampler, BatchSampler) else sampler
    drawn = torch.zeros(n_train, dtype=torch.bool)
    if own_batch_sampler(loader) is None and isinstance(sampler, (SubsetRandomSampler, list, tuple, range)):
        drawn[list(getattr(sampler, "indices", sampler))] = True
    elif own_batch_sampler(loader) is None and isinstance(sampler, WeightedRandomSampler):
        drawn[: len(sampler.weights)] = sampler.weights > 0
    elif own_batch_sampler(loader) is None and type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler):
        return None, None
    else:
        name = type(own_batch_sampler(loader) or sampler).__name__
        return None, f"Which examples {name} has drawn is not known: all {n_train:,} count as trained on."
    return None if bool(drawn.all()) else drawn, None
