"""TracInCallback: writes a Trace while fit runs."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import repeat
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from lightning_tracin._compat import DualCallback, batch_to_device, learns_nothing, on_training_loader
from lightning_tracin.capture import (
    Captured,
    Losses,
    batch_dims,
    capture,
    checked,
    gradients_enabled,
    weights_filled,
)
from lightning_tracin.collated_order import check_order
from lightning_tracin.gradients import DTYPES, Dtype, Kept
from lightning_tracin.layers import layer_name, layers_of_methods, layers_of_table, named_layer
from lightning_tracin.lock import locked
from lightning_tracin.losses import MeanLoss, check_batching, labels_of
from lightning_tracin.methods import METHODS
from lightning_tracin.mixin import embedding_layer_of, last_layer_of, losses_of, words_of_batch
from lightning_tracin.precision import full_precision
from lightning_tracin.processes import Processes, await_seen, processes_of, require_strategy, spreads
from lightning_tracin.report.loggers import check_loggers, logger_folder
from lightning_tracin.report.progress import progress_task
from lightning_tracin.runs import bytes_at_most
from lightning_tracin.sampled_indices import SampledIndices
from lightning_tracin.sharded import clean, in_step, is_sharded, require_automatic, require_spread, whole_state
from lightning_tracin.store import encoded_bytes, fitting_shard_examples
from lightning_tracin.trace import Checkpoint, Step, Trace, gradients_of
from lightning_tracin.training_cache import TrainingCache, check_training, divisor_of
from lightning_tracin.training_set import TrainingSet
from lightning_tracin.validation import ValidationLog


class TracInCallback(DualCallback):
    """Records checkpoints and learning rates during ``fit``, and stores every training example's gradients.

    What it writes is a :class:`~lightning_tracin.Trace`, from which ``trainer.influence`` scores training examples,
    in this process or in another. Training itself stays bit for bit as it is without the callback.

    Args:
        dirpath: folder of the trace. By default ``trace`` below the logger's folder (``lightning_logs/version_0``),
            or below ``default_root_dir`` without a logger.
        every_n_epochs: epochs between checkpoints, taken at the end of an epoch.
        every_n_train_steps: optimizer steps between checkpoints; if given, epochs do not count.
        cache: "checkpoint" makes a pass over the training set, in eval mode, at each checkpoint, and stores every
            example's gradients. "training" takes them from training's own backward passes, at next to no cost; they
            are then of the weights of the moment and with dropout on, and an example that no batch held since the
            last checkpoint counts zero there. "on_demand" leaves it to the first call of ``trainer.influence``.
        methods: what to store gradients for: "tracin-we" (the word embedding table), "tracin-last" (the last layer).
        dtype: what gradients are stored in. "float16" scales each row by its own float32 norm: exact to about 1e-3
            of a score however small gradients are. "float32" takes twice the space.
        top_words: store only each example's k words of largest gradient norm.
        projection: store word gradients projected at random to so many numbers for each word, their norms as they are.
            Scores become estimates, self-influence stays exact.
        log_examples: how many validation examples, those of the highest loss, are logged in every validation of the fit
            with the training examples that pushed them; or the indices of those to log from each validation loader (in
            the data set; in the loader's order where that shuffles or is a stream). 0 logs none.
        log_k: how many proponents and opponents of each are logged.
        overwrite: whether a trace that is already in ``dirpath`` may be replaced.

    Gradients are of the model as it computes: in the precision of training (16 bits, FSDP's ``mixed_precision``) where
    the fit stores them, in that of the trainer that is asked for test examples. What is done with them is done in full.

    With ``log_examples``, each validation hands a table to all of the trainer's loggers, and the curves
    ``tracin/same_label``, ``tracin/concentration`` and ``tracin/suspected_label_errors`` (see
    :func:`lightning_tracin.validation.summary`). Its examples are chosen while it runs, and scored, by the first of
    ``methods``, before training goes on: over all checkpoints up to then, that of the same epoch's end included. Where
    there is no checkpoint yet, they wait for the first one. They are logged under the step and epoch of their
    validation. Validation batches must be of the form that ``training_step`` takes. It costs a second forward pass of
    each validation batch (of the batches with the examples, where indices are given; without the mixin, of each example
    by itself). Each validation also takes, for every checkpoint so far, a backward pass of each logged example and one
    reading of the stored gradients: it grows with the number of checkpoints, not with that of validation examples.

    Raises:
        ValueError: on a wrong argument, and before training on a module, a loss or a training set that influence
            cannot be computed for. The message says what to change.
        FileExistsError: if ``dirpath`` holds the trace of another fit and ``overwrite`` is False.
        BlockingIOError: if another fit or query is writing into ``dirpath``.
        OSError: if the disk has not enough space for the gradients, before anything is written.

    Example::

        trainer = Trainer(max_epochs=3, callbacks=[TracInCallback("trace")])
        trainer.fit(model, datamodule=news)
        print(trainer.influence(test_loader))
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        cache: Literal["checkpoint", "training", "on_demand"] = "checkpoint",
        methods: Sequence[str] = ("tracin-we", "tracin-last"),
        dtype: Dtype = "float16",
        top_words: int | None = None,
        projection: int | None = None,
        log_examples: int | Sequence[int] = 0,
        log_k: int = 3,
        overwrite: bool = False,
    ) -> None:
        if cache not in ("checkpoint", "training", "on_demand"):
            raise ValueError(f"cache must be 'checkpoint', 'training' or 'on_demand', but got {cache!r}.")
        if not methods or isinstance(methods, str) or set(methods) - set(METHODS):
            raise ValueError(f"methods must be some of {tuple(METHODS)}, but got {methods!r}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, but got {dtype!r}.")
        for name, value in (
            ("top_words", top_words),
            ("projection", projection),
            ("every_n_train_steps", every_n_train_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, but got {value}.")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, but got {every_n_epochs}.")
        if log_k < 1:
            raise ValueError(f"log_k must be at least 1, but got {log_k}.")
        self.log_examples = _examples_to_log(log_examples)
        if self.log_examples and cache == "on_demand":
            raise ValueError(
                'log_examples needs gradients that are stored while the fit runs, but cache="on_demand" stores none. '
                'Use cache="checkpoint" or cache="training".'
            )
        self.log_k = log_k
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.cache = cache
        self.methods = tuple(method for method in METHODS if method in methods)
        self.kept = Kept(dtype, top_words, projection)
        self.overwrite = overwrite
        self.trace: Trace | None = None
        self.training_set: TrainingSet | None = None
        self._loader: Any = None
        self._fitting = False
        self._recording = False
        self._writing = ExitStack()  # holds the folder's lock
        self._steps: list[Step] = []
        self._resumed: dict[str, Any] = {}
        self._sampled: SampledIndices | None = None
        self._training: TrainingCache | None = None
        self._validations: ValidationLog | None = None
        self._failure: Exception | None = None
        self._dims: dict[torch.nn.Module, int] = {}

    @property
    def state_key(self) -> str:
        """Tells apart the callbacks of one trainer that write to different folders."""
        return self._generate_state_key(dirpath=str(self.dirpath))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start afresh for a fit; other stages leave the trace alone."""
        self._fitting = stage == "fit"
        self._recording = False
        self._validations = None
        if self._fitting:
            require_strategy(trainer)
            if self.log_examples and spreads(trainer):
                raise ValueError(
                    "log_examples needs whole weights, which FSDP spreads over the processes. Use log_examples=0, and "
                    "ask trainer.influence after the fit."
                )
            if self.log_examples:
                check_loggers(trainer.loggers)
            self._steps, self._resumed, self._failure = [], {}, None
            if self.cache == "training":
                others = (each for each in trainer.callbacks if isinstance(each, TracInCallback) and each is not self)  # type: ignore[attr-defined]
                if any(each.cache == "training" for each in others):
                    raise ValueError(
                        'A trainer can have one TracInCallback with cache="training", but got several. Use one with '
                        'all of the methods, or cache="checkpoint" for the others.'
                    )
                on_training_loader(trainer, self._sample)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on with the same trace."""
        if self.trace is None:
            return {}
        return {"trace": self.trace.id, "path": str(self.trace.path.absolute()), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the trace to go on with; only a fit does (predict with a checkpoint restores callbacks too)."""
        if self._fitting:
            self._resumed = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check all that can be checked on a first batch, and open the trace."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("TracInCallback records nothing in a fast_dev_run.")
            return
        processes = processes_of(trainer)
        with processes.together():
            require_spread(pl_module)
            require_automatic(pl_module)
            path = self._locked_path(trainer, processes)
            resumed = processes.gather(self._resumable(path) if processes.first else None)[0]
            training_set = TrainingSet(trainer.train_dataloader)
            check_order(training_set.loader, "training")
            if self.cache != "on_demand":
                training_set.check_divisible(processes)
            fingerprint = training_set.fingerprint()
            processes.require_same("training sets", fingerprint)
            layers, batch, example, self._dims = first_batch(trainer, pl_module, training_set, self.methods)
            form = None
            if self.cache == "training":
                _require_whole_epoch(trainer)
                with inside_fit(trainer, pl_module), weights_filled(pl_module):
                    form = check_training(pl_module, layers, self.methods, batch, example)
            state = whole_state(pl_module)
            if processes.first:
                self._require_space(trainer, state, path, example, training_set)
        with processes.together():
            if resumed is not None:
                trace = Trace(path)
                trace.check_data(len(training_set), fingerprint)
                if processes.first:
                    trace.check_model(state, type(pl_module).__name__)
                self._go_on(trace, layers, trainer.global_step, processes)
            elif processes.first:
                per_example = self._bytes_per_example(example, self.kept)
                Trace.create(
                    path,
                    state=state,
                    model_class=type(pl_module).__name__,
                    n_train=len(training_set),
                    data_fingerprint=fingerprint,
                    layers=layers,
                    kept=self.kept,
                    shard_examples=fitting_shard_examples(per_example, len(training_set), processes),
                )
        self.trace = _opened(path, processes)
        self.training_set = training_set
        self._loader = trainer.train_dataloader
        if form is not None:
            self._training = TrainingCache(pl_module, self.trace, self.methods, form, processes)
        self._recording = True
        self._prepare_log(trainer, pl_module, self.trace)

    def _prepare_log(self, trainer: pl.Trainer, module: pl.LightningModule, trace: Trace) -> None:
        """Be ready to log validations, if that is asked for and there will be any."""
        if not self.log_examples:
            return
        if not trainer.loggers or not trainer.enable_validation:
            missing = "the fit has no validation" if trainer.loggers else "the trainer has no logger"
            rank_zero_warn(f"log_examples has no effect: {missing}.")
            return
        self._validations = ValidationLog(trace, module, self.log_examples, self.log_k)

    def _go_on(self, trace: Trace, layers: dict[str, str], step: int, processes: Processes) -> None:
        """Go on with a trace where a resumed fit does.

        Raises:
            ValueError: if it was begun with other arguments.
        """
        if (trace.layers, trace.kept) != (layers, self.kept):
            raise ValueError(
                f"The trace in {trace.path} was begun with {trace.kept} at the layers {trace.layers}, but this fit "
                f"would go on with {self.kept} at {layers}. Resume with the same arguments."
            )
        if processes.first:
            trace.drop_checkpoints_after(step)
        last = processes.gather(max((each.step for each in trace.checkpoints), default=0))[0]
        self._steps = [tuple(step) for step in self._resumed["steps"] if step[0] >= last]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that a loader made anew (``reload_dataloaders_every_n_epochs``) is of the same training set."""
        if not self._recording or self.trace is None or trainer.train_dataloader is self._loader:
            return
        with processes_of(trainer).together():
            self._loader = trainer.train_dataloader
            _check_reloaded(TrainingSet(self._loader), self.trace, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log a validation that came before, and learn which examples the batch holds."""
        self._log_validations(trainer, pl_module)
        if self._training is not None and self._sampled is not None:
            with self._held(trainer):
                self._training.begin(self._sampled.next_batch(), batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the gradients of a training batch."""
        if self._training is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            divisor, scaled = divisor_of(trainer.accumulate_grad_batches, scaler)
            self._training.backward_ended(divisor=divisor, scaled=scaled)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the learning rates of this step: the last hook before a scheduler changes them."""
        if learns_nothing(trainer):
            return
        number = next((i for i, each in enumerate(trainer.optimizers) if _unwrapped(each) is _unwrapped(optimizer)), 0)
        self._steps.append((trainer.global_step, number, [float(group["lr"]) for group in optimizer.param_groups]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's gradients, and take a checkpoint if ``every_n_train_steps`` is due."""
        if self._training is not None and self._sampled is not None:
            with self._held(trainer):
                if batch is None:  # skipped: Lightning has not called on_train_batch_start
                    self._sampled.next_batch()
                self._training.end()
        if self.every_n_train_steps is not None and self._steps:
            before = self._steps[0][0] // self.every_n_train_steps
            if trainer.global_step // self.every_n_train_steps > before:
                self._take_checkpoint(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a checkpoint if ``every_n_epochs`` is due."""
        if self.every_n_train_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._take_checkpoint(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to choose examples of the validation."""
        if self._validations is not None:
            self._validations.begin(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at a validation batch, before ``validation_step`` may take it apart."""
        if self._validations is not None:
            with self._held(trainer), inside_fit(trainer, pl_module), torch.no_grad():
                self._validations.see(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose among the examples that all processes have seen."""
        if self._validations is not None:
            with processes_of(trainer).together():
                if self._failure is not None:
                    raise self._failure
                self._validations.end(trainer)

    def _log_validations(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the validations that are due: at the weights of each checkpoint in turn, training's own put back."""
        if self._validations is None or self.trace is None:
            return
        layers, method = self.trace.layers, self.methods[0]

        def gradients(batch: Any) -> Captured:
            with inside_fit(trainer, module):
                return capture_at(module, layers, [method], losses_of(module), batch, self._dims)

        self._validations.log(trainer, gradients)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last validation, and say so if the fit was too short for a checkpoint."""
        self._log_validations(trainer, pl_module)
        if self._recording and self.trace is not None and not self.trace.checkpoints:
            rank_zero_warn(
                f"The fit ended before the first checkpoint of the trace in {self.trace.path} was due: there is "
                "nothing to compute influence from. Lower every_n_epochs or every_n_train_steps."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the loader and the module as they were, and the folder to others."""
        self._leave(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What :meth:`teardown` does, which Lightning does not call after an error."""
        self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        with self._writing:  # let go last
            if self._training is not None:
                self._training.close()
            if self._sampled is not None:
                self._sampled.restore()
            if self.cache == "training":
                on_training_loader(trainer, None)
            self._training = self._sampled = self._validations = self._loader = None

    @contextmanager
    def _held(self, trainer: pl.Trainer) -> Iterator[None]:
        """With several processes, keep an error until the next checkpoint, where all of them hear of it.

        Raised in the middle of training, it would leave the others to wait for a gradient.
        """
        try:
            yield
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._failure = self._failure or error

    def _sample(self, loader: Any) -> None:
        """Remember what the sampler of the loader that the fit is about to read yields."""
        if self._sampled is not None:
            if self._sampled.loader is loader:
                return  # a reload may give the same one again
            self._sampled.restore()
        self._sampled = SampledIndices(loader)

    def _take_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trace = self.trace
        if trace is None or not self._recording or not self._steps:
            return  # a fast_dev_run, or nothing was trained since the last checkpoint
        step = trainer.global_step
        optimizers = [_unwrapped(each) for each in trainer.optimizers]
        processes = processes_of(trainer)
        with processes.together():  # before any of them waits for the others
            if self._failure is not None:
                raise self._failure
        n_came = 0 if self._training is None else self._training.came()
        if self._training is not None and not n_came:
            rank_zero_warn(
                f"No training batch has given finite gradients up to step {step}, so there is no checkpoint of it. "
                "That is usual while an fp16 loss scale is being found; otherwise look at the learning rate."
            )
            return
        with trace.new_checkpoint(
            module, optimizers, step=step, epoch=trainer.current_epoch, steps=self._steps, processes=processes
        ) as checkpoint:
            if self.cache == "checkpoint":
                self._cache(trainer, module, trace, checkpoint)
            elif self._training is not None:
                self._training.store(checkpoint, n_came)
        self._steps = []
        self._log_validations(trainer, module)

    def _cache(self, trainer: pl.Trainer, module: pl.LightningModule, trace: Trace, checkpoint: Checkpoint) -> None:
        """Store every training example's gradients at the module's present weights."""
        assert self.training_set is not None
        processes = processes_of(trainer)
        training_set, dims = self.training_set, self._dims
        order = trace.by_length(training_set, processes)
        loader = training_set.loader_over(order)
        sharded = is_sharded(module)
        with (
            trace.caching(checkpoint, self.methods, order, processes) as cache,
            progress_task(trainer.progress_bar_callback, "TracIn gradients", len(loader)) as advance,
            _buffers_of(checkpoint, module, processes),
            inside_fit(trainer, module),
        ):
            batches: Iterable[tuple[Any, bool]] = zip(loader, repeat(True))  # inside: beginning draws a random number
            if sharded:
                batches = in_step(loader, len(loader), training_set.first_batch, processes)
            for batch, own in batches:
                batch = batch_to_device(trainer, module, batch)
                captured = capture_at(module, trace.layers, self.methods, losses_of(module), batch, dims)
                with processes.together() if sharded else nullcontext():  # none leaves the others to wait for a weight
                    if own:
                        words = words_of_batch(module, batch, cache.unknown_tokens(captured))
                        cache.add(captured, labels_of(batch), words)
                        advance()

    def _locked_path(self, trainer: pl.Trainer, processes: Processes) -> Path:
        """The folder of the trace, the same for all processes, which the first one locks until the fit is left."""
        path = self._resolve_path(trainer)
        if processes.size > 1:  # each may be told another version by its logger, or run in another folder
            path = processes.gather(path.absolute())[0]
        self._writing.close()  # of a fit that another callback kept from telling that it ended
        if processes.first:
            self._writing.enter_context(locked(path))
        return path

    def _resolve_path(self, trainer: pl.Trainer) -> Path:
        """The folder of the trace: as given, as resumed, or where ModelCheckpoint would put its own."""
        if self.dirpath is not None:
            return self.dirpath
        if self._resumed and Path(self._resumed["path"]).exists():
            return Path(self._resumed["path"])
        if not trainer.loggers:
            return Path(trainer.default_root_dir) / "trace"
        return logger_folder(trainer.loggers[0], trainer.default_root_dir) / "trace"

    def _resumable(self, path: Path) -> str | None:
        """The id of the trace that a resumed fit goes on with, if it is still there.

        Raises:
            FileExistsError: if the trace of another fit is in its place, and must not be replaced.
        """
        exists = (path / "trace.json").exists()
        if self._resumed:
            if exists and Trace(path).id == self._resumed["trace"]:
                return str(self._resumed["trace"])
            rank_zero_warn(
                f"This fit is resumed, but the trace that it began ({self._resumed['path']}) is not in {path}: the "
                "checkpoints before this one will be missing from the scores."
            )
        if exists and not self.overwrite:
            raise FileExistsError(
                f"{path.absolute()} holds the trace of another fit. Pass another dirpath, or overwrite=True to replace "
                "it; a fit that is resumed with ckpt_path continues its own trace."
            )
        return None

    def _require_space(
        self, trainer: pl.Trainer, state: Mapping[str, Any], path: Path, example: Captured, training_set: TrainingSet
    ) -> None:
        """Compare what the fit will write with what the disk holds.

        Raises:
            OSError: if it is not enough; the message says how much is needed, and what would need less.
        """
        checkpoints = self._expected_checkpoints(trainer)
        weights = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))

        def needed(kept: Kept, cached: bool = True) -> float:
            one_pass = cached * self._bytes_per_example(example, kept) * len(training_set)
            beside = 0.0  # what came since the last checkpoint
            if self.cache == "training":
                beside = bytes_at_most(one_pass, self._passes_between(trainer, training_set), trainer.world_size)
            return checkpoints * (weights + one_pass) + beside

        existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
        free = shutil.disk_usage(existing).free
        need = needed(self.kept, self.cache != "on_demand")
        if need <= free:
            return
        smaller = replace(self.kept, dtype="float16", top_words=self.kept.top_words or 10)
        savers = [
            f'top_words={smaller.top_words} with dtype="float16" would need {_gigabytes(needed(smaller))}',
            f'dtype="float16" {_gigabytes(needed(replace(self.kept, dtype="float16")))}',
            f'cache="on_demand" {_gigabytes(needed(self.kept, cached=False))} until influence is asked for',
        ]
        raise OSError(
            errno.ENOSPC,
            f"The trace in {path} needs about {_gigabytes(need)} for {checkpoints} checkpoints of {len(training_set)} "
            f"training examples, but only {_gigabytes(free)} are free; nothing was written. {'; '.join(savers)}; a "
            "larger every_n_epochs, or fewer methods, less.",
        )

    def _bytes_per_example(self, example: Captured, kept: Kept) -> float:
        """Bytes that a checkpoint stores for each training example, as a first batch tells."""
        stored = (encoded_bytes(kept.of(gradients_of(example, method)), kept.dtype) for method in self.methods)
        return sum(stored) / len(example)

    def _passes_between(self, trainer: pl.Trainer, training_set: TrainingSet) -> float:
        """How many examples come between two checkpoints, to all processes, over the number of those that there are."""
        epochs = self.every_n_epochs
        if self.every_n_train_steps is not None:
            epochs = math.ceil(self.every_n_train_steps / _steps_each(trainer))
        sampler = training_set.loader.sampler
        drawn = len(sampler) if isinstance(sampler, Sized) else 0  # in each process; some samplers draw several times
        return epochs * max(1.0, drawn * trainer.world_size / len(training_set))

    def _expected_checkpoints(self, trainer: pl.Trainer) -> int:
        """How many checkpoints the fit has yet to take, at most; 1 if it has no end."""
        steps_each = _steps_each(trainer)
        last = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
        epochs = last - trainer.current_epoch
        steps = math.inf if trainer.max_steps < 0 else trainer.max_steps - trainer.global_step
        if self.every_n_train_steps is not None:
            checkpoints = min(steps, epochs * steps_each) / self.every_n_train_steps
        else:
            begun = math.ceil(steps / steps_each) if steps < math.inf else math.inf
            checkpoints = min(epochs, begun) / self.every_n_epochs
        return max(1, int(checkpoints)) if math.isfinite(checkpoints) else 1


def _examples_to_log(value: Any) -> int | tuple[int, ...]:
    """``log_examples`` as a number, or as indices.

    Raises:
        ValueError: if it is neither.
    """
    indices = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    for each in [value] if indices is None else indices:
        if isinstance(each, bool) or not isinstance(each, Integral) or int(each) < 0:
            raise ValueError(
                f"log_examples must be a number of validation examples or a list of their indices, but got {value!r}."
            )
    if indices is None:
        return int(value)
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"log_examples must name each validation example once, but got {value!r}.")
    return tuple(int(each) for each in indices)


@full_precision()  # so that what is compared differs by no rounding
def first_batch(
    trainer: pl.Trainer, module: pl.LightningModule, training_set: TrainingSet, methods: Sequence[str]
) -> tuple[dict[str, str], Any, Captured, dict[torch.nn.Module, int]]:
    """Find the layers, and check on the training set's first batch that influence can be computed.

    Returns:
        The layers' names by method; the batch on the module's device; its gradients; and what it tells of the
        layers' dimensions, as :func:`~lightning_tracin.capture.capture` takes it (under FSDP one backward pass of its
        own tells, for all batches).

    Raises:
        ValueError: if it cannot; the message says why, and what to do.
    """
    losses = losses_of(module)
    with inside_fit(trainer, module), weights_filled(module):
        batch = batch_to_device(trainer, module, training_set.first_batch())
        layers = {}
        if "tracin-we" in methods:
            layers["tracin-we"] = layer_name(module, embedding_layer_of(module))
        if "tracin-last" in methods:
            layers["tracin-last"] = layer_name(module, last_layer_of(module, lambda: checked(losses(batch))))
        dims = dims_at(module, layers, methods, losses, batch) if is_sharded(module) else {}
        captured = capture_at(module, layers, methods, losses, batch, dims)
        bad = captured.first_not_finite()
        if bad is not None:
            raise ValueError(
                f"The loss or gradient of training example {training_set.first_indices[bad]} is NaN or infinite before "
                "training began."
            )
        check_mean(module, next(iter(layers.values())), losses, batch)
        if not training_set.iterable and not is_sharded(module):  # a pass without gradients is too many for FSDP

            def batch_of(indices: Sequence[int]) -> Any:
                return batch_to_device(trainer, module, next(iter(training_set.loader_over(indices))))

            check_batching(module, losses, batch_of, training_set.first_indices, batch, captured.losses)
    return layers, batch, captured, dims


def check_mean(module: torch.nn.Module, layer: str, losses: Losses, batch: Any) -> None:
    """Check on a batch that a module without losses of single examples returns their mean.

    Raises:
        ValueError: if it returns anything else.
    """
    if isinstance(losses, MeanLoss):
        losses.check(batch)
        losses.check_batch_first(batch, layers_of_table(module, named_layer(module, layer)))


def dims_at(
    module: torch.nn.Module, layers: Mapping[str, str], methods: Sequence[str], losses: Losses, batch: Any
) -> dict[torch.nn.Module, int]:
    """What a batch tells of the layers of some methods, as :func:`capture_at` takes it, by a pass of its own."""
    tables, linear = layers_of_methods(module, layers, methods)
    return batch_dims(losses, batch, [*tables, *linear], independent=not isinstance(losses_of(module), MeanLoss))


def capture_at(
    module: torch.nn.Module,
    layers: Mapping[str, str],
    methods: Sequence[str],
    losses: Losses,
    batch: Any,
    dims: dict[torch.nn.Module, int],
) -> Captured:
    """The gradients of a batch that some methods need, at the layers of those names."""
    tables, linear = layers_of_methods(module, layers, methods)
    reading: list[torch.nn.Module] = []
    if not tables and "tracin-we" in layers and not is_sharded(module):  # the last layer does not tell what was read
        reading, _ = layers_of_methods(module, layers, ["tracin-we"])
    return capture(
        losses,
        batch,
        embedding_layers=tables,
        linear_layer=linear[0] if linear else None,
        reading_layers=reading,
        dims=dims,
        module=None if is_sharded(module) else module,
        independent=not isinstance(losses_of(module), MeanLoss),
    )


@contextmanager
def inside_fit(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Compute gradients between two training batches without a trace in training: no random number is drawn from it."""
    with isolate_rng(), gradients_enabled(module), trainer.precision_plugin.predict_step_context():
        yield


@contextmanager
def _buffers_of(checkpoint: Checkpoint, module: torch.nn.Module, processes: Processes) -> Iterator[None]:
    """Lend a module the buffers that were recorded: under DDP those of the processes differ between forward passes."""
    own: list[tuple[Tensor, Tensor]] = []
    if not processes.first and any(True for _ in module.buffers()):
        recorded = checkpoint.weights()
        for name, buffer in module.named_buffers():
            if clean(name) in recorded:
                own.append((buffer, buffer.clone()))
                buffer.copy_(recorded[clean(name)])
    try:
        yield
    finally:
        for buffer, value in own:
            buffer.copy_(value)


def _require_whole_epoch(trainer: pl.Trainer) -> None:
    """Check that a fit does not go on inside an epoch by a loader that leaves out what the epoch has seen.

    Raises:
        ValueError: if it does.
    """
    loader = trainer.train_dataloader
    if trainer.fit_loop.restarting and hasattr(loader, "load_state_dict"):
        raise ValueError(
            f"This fit is resumed inside an epoch, and its {type(loader).__name__} goes on where it was: "
            'cache="training" cannot tell which examples its batches hold. Resume from the checkpoint of an epoch\'s '
            'end, or use cache="checkpoint".'
        )


def _opened(path: Path, processes: Processes) -> Trace:
    """The trace that the first process has begun, or goes on with.

    Raises:
        FileNotFoundError: if this process does not see it.
    """
    begun = processes.gather(Trace(path).id if processes.first else None)[0]
    with processes.together():

        def seen() -> bool:
            return (path / "trace.json").exists() and Trace(path).id == begun

        await_seen(seen, f"The first process has begun a trace in {path.absolute()}")
        return Trace(path)


def _steps_each(trainer: pl.Trainer) -> int:
    """How many optimizer steps an epoch has, as gradients are accumulated now."""
    return max(1, math.ceil(min(trainer.num_training_batches, 2**53) / trainer.accumulate_grad_batches))


def _check_reloaded(training_set: TrainingSet, trace: Trace, epoch: int) -> None:
    """Check that the training set of a later epoch is that which a trace was begun with.

    Raises:
        ValueError: if it is not.
    """
    if (len(training_set), training_set.fingerprint()) == (trace.n_train, trace.data_fingerprint):
        return
    difference = (
        f"{len(training_set)} examples instead of {trace.n_train}"
        if len(training_set) != trace.n_train
        else "other examples, or the same in another order"
    )
    raise ValueError(
        f"The training loader was made anew for epoch {epoch}, and its data set has {difference}: gradients would be "
        "stored under the numbers of other examples. Let train_dataloader give the same data set each time, with all "
        "of the examples, and its sampler choose those of the epoch; or fit without reload_dataloaders_every_n_epochs."
    )


def _unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
