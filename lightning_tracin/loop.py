"""The influence loop: checkpoint by checkpoint, batch by batch, over the public ``Trainer.predict``.

``predict`` is the one entry point of Lightning that reports true data set indices, does not wrap the module and does
not pad. The loop gives it the module at each checkpoint's weights in turn, with a step that returns gradients, and a
prediction writer that takes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
from torch import Tensor, nn

from lightning_tracin._compat import PROGRESS_BARS, DualPredictionWriter, batch_to_device
from lightning_tracin.callback import TracInCallback, capture_at, check_mean, dims_at, inside_fit
from lightning_tracin.capture import Captured, Losses, gradients_enabled, usable_in_autograd
from lightning_tracin.collated_order import check_order
from lightning_tracin.lock import locked
from lightning_tracin.losses import labels_of
from lightning_tracin.methods import Method, TracInWE, method_of
from lightning_tracin.mixin import losses_of, words_of_batch
from lightning_tracin.processes import Processes, await_seen, launched, leave, require_results, spreads
from lightning_tracin.query import TestExamples, scored, weights_kept
from lightning_tracin.report.progress import labelled
from lightning_tracin.result import InfluenceResult
from lightning_tracin.scores import clipped_k, moments_of, self_influences
from lightning_tracin.sharded import in_step, is_sharded, load_whole, require_spread, whole_state
from lightning_tracin.trace import CachePass, Checkpoint, Trace
from lightning_tracin.training_set import TrainingSet, only_test_loader, own_part, spare_batch

_HOOKS = [f"on_predict_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")]

#: Takes a batch's gradients, the data set indices of its examples (none for an iterable data set), and the batch.
_Take: TypeAlias = Callable[[Captured, list[int], Any], None]

#: For each layer, the dimension of its calls that counts the examples, as far as batches told.
_Dims: TypeAlias = dict[nn.Module, int]


def influence(
    trainer: pl.Trainer,
    dataloaders: Any = None,
    model: pl.LightningModule | None = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    train_dataloaders: Any = None,
    trace: str | Path | Trace | None = None,
    method: str | Method = "tracin-we",
    k: int | None = None,
) -> InfluenceResult:
    """Score every training example's influence on every test example.

    Works with the trainers of ``pytorch_lightning`` and ``lightning.pytorch``.

    Args:
        trainer: runs the test examples through the model, on its own device and precision.
        dataloaders: one loader of test examples, in batches that ``training_step`` takes.
        model: the trained module; by default that of the last fit in this process.
        datamodule: gives ``test_dataloader`` and ``train_dataloader`` where loaders are not passed.
        train_dataloaders: one loader of the training set of the fit. It is needed only where gradients are not
            stored yet (``cache="on_demand"``); by default that of the last fit in this process.
        trace: what the fit recorded, or its folder; by default that of the last fit in this process.
        method: "tracin-we", "tracin-last", or a :class:`TracInWE` or :class:`TracInLast` with options.
        k: keep only the k strongest proponents and opponents of each test example. Memory then does not grow with
            the training set.

    Returns:
        Scores, one row for each test example in the order of the test data set.

    Raises:
        ValueError: if the model or the training set is not that of the trace, if a loader is empty or there are
            several, if gradients are not finite, or if there is nothing to score from. The message says what to do.
        BlockingIOError: if gradients are missing, and a fit or another query is writing into the trace.
    """
    chosen = method_of(method)
    require_results(trainer)
    processes = launched(trainer)
    with processes.together():
        module = _module(trainer, model)
        opened = _trace(trainer, trace)
        if dataloaders is None and datamodule is not None:
            dataloaders = _from_datamodule(trainer, datamodule, "test", processes)
        loader = only_test_loader(dataloaders)
        check_order(loader, "test")
        loader = own_part(loader, processes)
        kept = None if k is None else clipped_k(k, opened.n_train)
    _spread(trainer, module, loader, datamodule)
    with weights_kept(module):
        checkpoints = _ready(trainer, module, opened, chosen, datamodule, train_dataloaders, processes)
        hooks = datamodule or _attached(trainer, module)
        test = TestExamples(module, chosen, opened)
        losses = test.outputs.watching(losses_of(module))
        dims: _Dims = {}
        for number, checkpoint in enumerate(checkpoints, start=1):
            description = f"Test gradients {number}/{len(checkpoints)}"
            _run(trainer, module, checkpoint, chosen, loader, hooks, losses, test.take, description, dims, processes)
            with processes.together():
                test.finish_checkpoint(checkpoint, processes)
    with processes.together():
        return scored(test, checkpoints, kept, processes, trainer.strategy.root_device)


def self_influence(
    trainer: pl.Trainer,
    model: pl.LightningModule | None = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    train_dataloaders: Any = None,
    trace: str | Path | Trace | None = None,
    method: str | Method = "tracin-we",
) -> Tensor:
    """Every training example's influence on itself: high for mislabelled and for atypical examples.

    Args:
        trainer: as for :func:`influence`, like all that follow.
        model: needed only where gradients are not stored yet.
        datamodule: see :func:`influence`.
        train_dataloaders: see :func:`influence`.
        trace: see :func:`influence`.
        method: see :func:`influence`.

    Returns:
        (n_train,) float32: the diagonal of the training examples' scores on themselves.

    Raises:
        ValueError: see :func:`influence`.
        BlockingIOError: see :func:`influence`.
    """
    chosen = method_of(method)
    processes = launched(trainer)
    module = _given(model) or trainer.lightning_module
    with processes.together():
        opened = _trace(trainer, trace)
        module = None if module is None else _usable(trainer, module)
    if module is not None:
        _spread(trainer, module, [], datamodule)
    with weights_kept(module) if module is not None else nullcontext():
        checkpoints = _ready(trainer, module, opened, chosen, datamodule, train_dataloaders, processes)
    with processes.together():
        return self_influences(checkpoints, chosen, processes)


def _ready(
    trainer: pl.Trainer,
    module: pl.LightningModule | None,
    trace: Trace,
    method: Method,
    datamodule: pl.LightningDataModule | None,
    train_dataloaders: Any,
    processes: Processes,
) -> list[Checkpoint]:
    """The trace's checkpoints, each with the gradients that the method needs; missing ones are computed now."""
    with processes.together():
        _await_checkpoints(trace, method, processes)
        checkpoints = trace.checkpoints
        _check_recorded(trace, method, checkpoints)
        if module is not None:
            state = whole_state(module)
            if processes.first or not is_sharded(module):
                trace.check_model(state, type(module).__name__)
        missing = [each for each in checkpoints if not each.has_gradients(method.name)]
        training_set = None
        if train_dataloaders is not None:
            training_set = TrainingSet(train_dataloaders)
        elif datamodule is not None and datamodule is not trainer.datamodule and _has_training_set(datamodule):  # type: ignore[attr-defined]
            training_set = TrainingSet(_from_datamodule(trainer, datamodule, "train", processes))
        elif missing:
            training_set = next((of for written, of in _last_fits(trainer) if written.id == trace.id), None)
        if training_set is not None:
            trace.check_data(len(training_set), training_set.fingerprint())
        if missing and (module is None or training_set is None):
            what = "model (model=...)" if module is None else "training set (train_dataloaders=... or datamodule=...)"
            raise ValueError(
                f"{len(missing)} of the {len(checkpoints)} checkpoints in {trace.path} have no stored gradients for "
                f"{method.name}; pass the {what} to compute them."
            )
        if missing and training_set is not None:
            training_set.check_divisible(processes)
            check_order(training_set.loader, "training")
    if missing and module is not None and training_set is not None:
        require_results(trainer)
        hooks = datamodule or _attached(trainer, module)
        _fill(trainer, module, trace, method, missing, training_set, hooks, processes)
    return checkpoints


def _await_checkpoints(trace: Trace, method: Method, processes: Processes) -> None:
    """Wait until this process sees the checkpoints and gradients in the trace that the first one sees."""

    def seen() -> list[Any]:
        return [(each.id, each.has_gradients(method.name)) for each in trace.checkpoints]

    of_first = processes.gather(seen())[0]
    await_seen(lambda: seen() == of_first, f"The first process sees {len(of_first)} checkpoints in {trace.path}")


def _check_recorded(trace: Trace, method: Method, checkpoints: Sequence[Checkpoint]) -> None:
    """Check that the fit recorded what a method needs, as far as it is stored."""
    if not checkpoints:
        raise ValueError(f"The trace in {trace.path} has no checkpoint yet: there is nothing to score from.")
    if method.name not in trace.layers:
        raise ValueError(
            f"The fit did not record the layer of {method.name}: it ran with methods={tuple(trace.layers)}. Fit again "
            f'with "{method.name}" among the methods of TracInCallback.'
        )
    kept = trace.kept
    if kept.top_words is not None and (getattr(method, "top_words", None) or 0) > kept.top_words:
        raise ValueError(f"The trace keeps {kept.top_words} words of each example; {method} asks for more.")
    if kept.projection is not None and isinstance(method, TracInWE) and method.precondition is not None:
        raise ValueError(
            f"The trace keeps word gradients projected to {kept.projection} numbers, which Adam's second moments "
            'cannot be applied to. Fit without projection for precondition="adam".'
        )
    for checkpoint in checkpoints:
        moments_of(checkpoint, method)  # raises where the method needs some and there are none
        if checkpoint.has_gradients(method.name):
            trace.check_counts(checkpoint.gradients(method.name))


def _fill(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    trace: Trace,
    method: Method,
    missing: Sequence[Checkpoint],
    training_set: TrainingSet,
    datamodule: pl.LightningDataModule | None,
    processes: Processes,
) -> None:
    """Compute and store the training examples' gradients at the checkpoints that have none."""
    with ExitStack() as contexts:
        with processes.together():
            if processes.first:
                contexts.enter_context(locked(trace.path, within_fit=True))
                trace.check_in_place()
            _await_checkpoints(trace, method, processes)
            missing = [each for each in missing if not each.has_gradients(method.name)]  # others may have stored some
        contexts.enter_context(_attribute(trainer, "limit_predict_batches", 1.0))  # every training example
        losses = losses_of(module)
        dims: _Dims = {}
        for number, checkpoint in enumerate(missing, start=1):
            with processes.together():
                order = trace.by_length(training_set, processes)
            loader = training_set.loader_over(order)
            with trace.caching(checkpoint, [method.name], order, processes) as cache:

                def take(captured: Captured, _: list[int], batch: Any, cache: CachePass = cache) -> None:
                    words = words_of_batch(module, batch, cache.unknown_tokens(captured))
                    cache.add(captured, labels_of(batch), words)

                description = f"Training gradients {number}/{len(missing)}"
                _run(
                    trainer, module, checkpoint, method, loader, datamodule, losses, take, description, dims, processes
                )


def _run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    checkpoint: Checkpoint,
    method: Method,
    loader: Any,
    datamodule: pl.LightningDataModule | None,
    losses: Losses,
    take: _Take,
    description: str,
    dims: _Dims,
    processes: Processes,
) -> None:
    """Run a loader through ``trainer.predict`` at a checkpoint's weights, and hand the gradients of its losses on.

    The first of several runs, which finds ``dims`` empty, also checks that the losses are those of single examples.
    """
    if is_sharded(module):
        _run_in_step(trainer, module, checkpoint, method, loader, losses, take, dims, processes)
        return
    with processes.together():  # past this point they wait for each other inside of Lightning
        weights = checkpoint.weights()
    step = partial(_gradient_step, module, checkpoint.layers, method.name, losses, dims)
    bars = [labelled(bar, description) for bar in trainer.callbacks if isinstance(bar, PROGRESS_BARS)]  # type: ignore[attr-defined]
    trainer.predict_loop.current_batch_indices = []  # a loader without indices would be given those of the last one
    writer = _Writer(take, weights)
    failure = None
    with ExitStack() as stack:
        stack.enter_context(_attribute(trainer, "callbacks", [*bars, writer]))
        stack.enter_context(_attribute(module, "predict_step", step))
        for hook in _HOOKS:  # no prediction of the user's, as for callbacks
            stack.enter_context(_attribute(module, hook, _nothing))
        if processes.size > 1:  # fewer examples than processes are no mistake
            stack.enter_context(_attribute(module, "allow_zero_length_dataloader_with_multiple_devices", True))
        try:
            if datamodule is None:
                trainer.predict(module, loader, return_predictions=False)
            else:
                stack.enter_context(_attribute(trainer, "datamodule", trainer.datamodule))  # type: ignore[attr-defined]
                trainer.predict(module, datamodule=_serving(datamodule, loader), return_predictions=False)
        except Exception as error:
            if not writer.started:
                leave(error)
                raise
            failure = error
    with processes.together():
        if failure is not None:
            raise failure


def _run_in_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    checkpoint: Checkpoint,
    method: Method,
    loader: Any,
    losses: Losses,
    take: _Take,
    dims: _Dims,
    processes: Processes,
) -> None:
    """What :func:`_run` does, under FSDP: not by ``predict``, which makes no more passes than it has batches."""
    with processes.together():
        weights = checkpoint.weights()
    load_whole(module, weights)
    layers = checkpoint.layers
    limit = trainer.limit_predict_batches
    n_batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
    indices = iter(loader.batch_sampler or loader.sampler)
    with inside_fit(trainer, module):
        with processes.together():
            spare = batch_to_device(trainer, module, spare_batch(loader, processes))
        if not dims:
            check_mean(module, layers[method.name], losses_of(module), spare)
            dims |= dims_at(module, layers, [method.name], losses, spare)
        for batch, own in in_step(loader, n_batches, lambda: spare, processes):
            batch = batch_to_device(trainer, module, batch)
            captured = capture_at(module, layers, [method.name], losses, batch, dims)
            with processes.together():
                if own:
                    take(captured, [int(index) for index in next(indices)], batch)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for a hook of the user's."""


def _gradient_step(
    module: pl.LightningModule,
    layers: dict[str, str],
    method: str,
    losses: Losses,
    dims: _Dims,
    batch: Any,
    batch_idx: int,
) -> Captured:
    """Stands in for ``predict_step``: the gradients of a batch, in spite of predict's inference mode."""
    with gradients_enabled(module):
        batch = usable_in_autograd(batch)
        if not dims:
            check_mean(module, layers[method], losses_of(module), batch)
        try:
            return capture_at(module, layers, [method], losses, batch, dims)
        except RuntimeError as error:
            if "Inference tensors cannot be saved for backward" in str(error):
                raise RuntimeError(
                    f"{type(module).__name__} keeps a tensor that an earlier trainer.predict, test or validate made in "
                    "inference mode. Build the trainer with inference_mode=False."
                ) from error
            raise


class _Writer(DualPredictionWriter):
    """Gives the module a checkpoint's weights, and learns from Lightning which examples a batch held."""

    def __init__(self, take: _Take, weights: Mapping[str, Any]) -> None:
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


def _module(trainer: pl.Trainer, model: pl.LightningModule | None) -> pl.LightningModule:
    module = _given(model) or trainer.lightning_module
    if module is None:
        raise ValueError("This trainer has not fitted a model in this process: pass model=..., and trace=...")
    return _usable(trainer, module)


def _given(model: Any) -> pl.LightningModule | None:
    """The model that was passed, uncompiled.

    Raises:
        TypeError: if it is none.
    """
    module = getattr(model, "_orig_mod", model)
    if not isinstance(module, (nn.Module, type(None))):
        raise TypeError(
            f"model must be a LightningModule, but got {type(module).__name__}. The order is trainer.influence("
            "test_loader, model) and trainer.self_influence(model, train_dataloaders=train_loader)."
        )
    return module  # type: ignore[return-value]


def _usable(trainer: pl.Trainer, module: pl.LightningModule) -> pl.LightningModule:
    """The module with all of its layers, unless another trainer has spread its weights.

    Raises:
        ValueError: if one has.
    """
    if not is_sharded(module):
        module.configure_model()  # a new module has yet to build its layers; it may be called again
    elif module.trainer is not trainer:
        raise ValueError(
            f"Another trainer has spread the weights of this {type(module).__name__} over its processes (FSDP). Pass a "
            "new one as model=...; the trace has the weights."
        )
    return module


def _spread(
    trainer: pl.Trainer, module: pl.LightningModule, loader: Any, datamodule: pl.LightningDataModule | None
) -> None:
    """Let Lightning spread the weights of a module over the processes, if FSDP is the trainer's strategy.

    Raises:
        ValueError: if they cannot be, or if they are and a datamodule comes too late.
    """
    if not spreads(trainer):
        return
    if not is_sharded(module):
        with (
            _attribute(trainer, "limit_predict_batches", 0),
            _attribute(trainer, "callbacks", []),
            _attribute(trainer, "datamodule", trainer.datamodule),  # type: ignore[attr-defined]
        ):
            served = {"dataloaders": loader} if datamodule is None else {"datamodule": _serving(datamodule, loader)}
            trainer.predict(module, return_predictions=False, **served)
    elif datamodule is not None and datamodule is not trainer.datamodule:  # type: ignore[attr-defined]
        raise ValueError(
            "FSDP has spread this model together with another datamodule, whose hooks handle its batches. Pass the new "
            "one's loaders instead (dataloaders=..., train_dataloaders=...), or a new model."
        )
    require_spread(module)


def _trace(trainer: pl.Trainer, trace: str | Path | Trace | None) -> Trace:
    """The trace that is passed, or that the last fit of this trainer wrote."""
    if trace is None:
        trace = next((written for written, _ in _last_fits(trainer)), None)
    if trace is None:
        raise ValueError(
            "There is no trace to compute influence from: fit with TracInCallback among the trainer's callbacks, or "
            "pass the folder of an earlier fit as trace=..."
        )
    if not isinstance(trace, Trace):
        return Trace(trace)
    trace.check_in_place()
    return trace


def _last_fits(trainer: pl.Trainer) -> list[tuple[Trace, TrainingSet]]:
    """The traces that the last fit in this process wrote, and the training sets that they are of."""
    callbacks = [each for each in trainer.callbacks if isinstance(each, TracInCallback)]  # type: ignore[attr-defined]
    return [(each.trace, each.training_set) for each in callbacks if each.trace and each.training_set]


def _from_datamodule(
    trainer: pl.Trainer, datamodule: pl.LightningDataModule, kind: Literal["test", "train"], processes: Processes
) -> Any:
    """A datamodule's test or training loader, set up as Lightning would."""
    if datamodule.trainer is None:
        datamodule.trainer = trainer
    with processes.together():
        if trainer.local_rank == 0:
            datamodule.prepare_data()
    datamodule.setup("test" if kind == "test" else "fit")
    return datamodule.test_dataloader() if kind == "test" else datamodule.train_dataloader()


def _has_training_set(datamodule: pl.LightningDataModule) -> bool:
    """Whether a datamodule has a training loader of its own, not that of either Lightning, which raises."""
    return getattr(datamodule.train_dataloader, "__qualname__", "") != "DataHooks.train_dataloader"


def _attached(trainer: pl.Trainer, module: nn.Module) -> pl.LightningDataModule | None:
    """The datamodule of the last fit, if that was a fit of this module: its batch hooks belong to the examples."""
    return trainer.datamodule if module is trainer.lightning_module else None  # type: ignore[attr-defined]


def _serving(datamodule: pl.LightningDataModule, loader: Any) -> pl.LightningDataModule:
    """A copy of a datamodule that predict takes this loader from, so that its batch hooks run."""
    copied = copy.copy(datamodule)
    copied.predict_dataloader = lambda: loader  # type: ignore[method-assign]
    copied.prepare_data = lambda: None  # type: ignore[method-assign]
    copied.setup = lambda stage: None  # type: ignore[method-assign]
    copied.teardown = lambda stage: None  # type: ignore[method-assign]
    return copied


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
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
