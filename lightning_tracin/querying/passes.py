"""One pass over a loader at a checkpoint's weights, over the public ``Trainer.predict``.

``predict`` is the one entry point of Lightning that reports true data set indices, does not wrap the module and does
not pad. A pass gives it the module at a checkpoint's weights, with a step that returns gradients, and a prediction
writer that takes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pytorch_lightning as pl

from lightning_tracin.bridge.compat import PROGRESS_BARS, DualPredictionWriter, at_step, batch_to_device
from lightning_tracin.bridge.module_gradients import inside_fit
from lightning_tracin.bridge.progress import labelled
from lightning_tracin.bridge.query_examples import spare_batch
from lightning_tracin.bridge.unmoved import module_unmoved, unmoved
from lightning_tracin.gradients.batches import batch_size
from lightning_tracin.gradients.capture import without_inference_tensors
from lightning_tracin.gradients.eval_mode import gradients_enabled
from lightning_tracin.parallel.fsdp import is_fsdp, load_full_state_dict, synchronized_batches
from lightning_tracin.parallel.processes import Processes, mark_shared
from lightning_tracin.querying.chosen_checkpoints import CheckpointChoice
from lightning_tracin.querying.steps import Step
from lightning_tracin.scoring.methods import Method
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.trace import Trace

_HOOKS = [f"on_predict_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")]

#: Takes what a batch gave, the data set indices of its examples (none for an iterable data set), and the batch.
Take: TypeAlias = Callable[[Any, list[int], Any], None]


@dataclass(frozen=True)
class Query:
    """What a question is about.

    Attributes:
        trainer: runs examples through the module, on its own device and precision.
        module: is given the weights of each checkpoint in turn.
        trace: has the checkpoints.
        method: what scores will be.
        datamodule: whose batch hooks belong to the examples, if any.
        processes: those that work together.
        checkpoints: which of the trace's count.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    trace: Trace
    method: Method
    datamodule: pl.LightningDataModule | None
    processes: Processes
    checkpoints: CheckpointChoice


@dataclass(frozen=True)
class Pass:
    """What is run through a module at each of several checkpoints.

    Attributes:
        loader: of the examples.
        step: what is done with each batch.
        take: is handed what a batch gave.
        description: for the progress bar.
    """

    loader: Any
    step: Step
    take: Take
    description: str


def run_pass(query: Query, checkpoint: Checkpoint, of: Pass) -> None:
    """Run a loader through ``trainer.predict`` at a checkpoint's weights, and hand on what its batches give.

    The trainer says that this is the checkpoint's step. What the loader and the module hold is then as it was: a data
    set's generators, buffers, metrics, counters.
    """
    run = _run_in_step if is_fsdp(query.module) else _run_by_predict
    with unmoved(of.loader), at_step(query.trainer, checkpoint.step, checkpoint.epoch):
        run(query, checkpoint, of)


def _run_by_predict(query: Query, checkpoint: Checkpoint, of: Pass) -> None:
    """What :func:`run_pass` does, where each process has the whole module."""
    trainer, module, processes = query.trainer, query.module, query.processes
    with processes.synchronized():  # past this point they wait for each other inside of Lightning
        weights = checkpoint.weights()
    bars = [labelled(bar, of.description) for bar in trainer.callbacks if isinstance(bar, PROGRESS_BARS)]  # type: ignore[attr-defined]
    trainer.predict_loop.current_batch_indices = []  # a loader without indices would be given those of the last one
    writer = _Writer(of.take, weights)
    failure = None
    with ExitStack() as stack:
        stack.enter_context(module_unmoved(module, query.datamodule, trainer))
        if processes.size > 1:  # fewer examples than processes are no mistake
            stack.enter_context(attribute_set(module, "allow_zero_length_dataloader_with_multiple_devices", True))
        try:
            step = partial(_in_predict, of.step, _Numbering(trainer))
            predict_by(step, trainer, module, of.loader, query.datamodule, callbacks=[*bars, writer])
        except Exception as error:
            if not writer.started:
                mark_shared(error)
                raise
            failure = error
    with processes.synchronized():
        if failure is not None:
            raise failure


def predict_by(
    step: Callable[[Any, int], Any],
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Any,
    datamodule: pl.LightningDataModule | None,
    *,
    callbacks: Sequence[Any],
) -> None:
    """Run a loader through ``trainer.predict``, with a step of ours, and without the user's callbacks and hooks.

    Args:
        step: in the place of ``predict_step``.
        trainer: runs it.
        module: the module.
        loader: of the examples.
        datamodule: whose batch hooks belong to them, if any.
        callbacks: in the place of the trainer's.
    """
    with ExitStack() as stack:
        stack.enter_context(attribute_set(trainer, "callbacks", list(callbacks)))
        stack.enter_context(attribute_set(module, "predict_step", step))
        for hook in _HOOKS:  # no prediction of the user's, as for callbacks
            stack.enter_context(attribute_set(module, hook, _nothing))
        if datamodule is None:
            trainer.predict(module, loader, return_predictions=False)
        else:
            stack.enter_context(attribute_set(trainer, "datamodule", trainer.datamodule))  # type: ignore[attr-defined]
            trainer.predict(module, datamodule=serving(datamodule, loader), return_predictions=False)


def _run_in_step(query: Query, checkpoint: Checkpoint, of: Pass) -> None:
    """What :func:`run_pass` does under FSDP: not by ``predict``, which makes no more passes than it has batches."""
    trainer, module, processes = query.trainer, query.module, query.processes
    with processes.synchronized():
        weights = checkpoint.weights()
    load_full_state_dict(module, weights)
    limit = trainer.limit_predict_batches
    n_batches = min(len(of.loader), limit) if isinstance(limit, int) else int(len(of.loader) * limit)
    indices = iter(of.loader.batch_sampler or of.loader.sampler)
    with inside_fit(trainer, module):
        with processes.synchronized():
            spare = batch_to_device(trainer, module, spare_batch(of.loader, processes))
        of.step.begin(spare)
        for batch, own in synchronized_batches(of.loader, n_batches, lambda: spare, processes):
            batch = batch_to_device(trainer, module, batch)
            numbers = [int(index) for index in next(indices)] if own else None
            given = of.step(batch, numbers)
            with processes.synchronized():
                if numbers is not None:
                    of.take(given, numbers, batch)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for a hook of the user's."""


def _in_predict(step: Step, numbering: _Numbering, batch: Any, batch_idx: int) -> Any:
    """Stands in for ``predict_step``: a pass's own step, in spite of predict's inference mode."""
    module = step.module
    with gradients_enabled(module):
        batch = without_inference_tensors(batch)
        try:
            return step(batch, numbering.of(batch))
        except RuntimeError as error:
            if "Inference tensors cannot be saved for backward" in str(error):
                raise RuntimeError(
                    f"{type(module).__name__} keeps a tensor that an earlier trainer.predict, test or validate made in "
                    "inference mode. Build the trainer with inference_mode=False."
                ) from error
            raise


class _Numbering:
    """Tells the data set indices of a batch's examples inside ``predict_step``; those of a stream are counted."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._n_seen = 0

    def of(self, batch: Any) -> list[int]:
        """The numbers of the next batch's examples."""
        start, self._n_seen = self._n_seen, self._n_seen + (batch_size(batch) or 0)
        indices = [int(index) for index in self._trainer.predict_loop.current_batch_indices]
        return indices or list(range(start, self._n_seen))


class _Writer(DualPredictionWriter):
    """Gives the module a checkpoint's weights, and learns from Lightning which examples a batch held."""

    def __init__(self, take: Take, weights: Mapping[str, Any]) -> None:
        super().__init__("batch")
        self.take = take
        self.weights = weights
        self.started = False

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here to the end of the run, Lightning's processes do not wait for each other."""
        self.started = True
        # not before: setup may have built layers anew; names were compared by Trace.check_model
        pl_module.load_state_dict(self.weights, strict=False)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand a batch's gradients on, with the data set indices of its examples; none for an iterable data set."""
        self.take(prediction, [int(index) for index in batch_indices or ()], batch)


def serving(datamodule: pl.LightningDataModule, loader: Any) -> pl.LightningDataModule:
    """A copy of a datamodule that predict takes this loader from, so that its batch hooks run."""
    copied = copy.copy(datamodule)
    copied.predict_dataloader = lambda: loader  # type: ignore[method-assign]
    copied.prepare_data = lambda: None  # type: ignore[method-assign]
    copied.setup = lambda stage: None  # type: ignore[method-assign]
    copied.teardown = lambda stage: None  # type: ignore[method-assign]
    return copied


@contextmanager
def attribute_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an instance for a while."""
    had = name in vars(owner)
    before = getattr(owner, name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)
