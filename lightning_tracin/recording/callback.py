"""TracInCallback: writes a Trace while fit runs. It translates Lightning's hooks; the Recorder does the work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_tracin.bridge.compat import DualCallback
from lightning_tracin.bridge.recorded_fits import KeptFit, kept_fits
from lightning_tracin.bridge.strategy import require_strategy, spreads
from lightning_tracin.bridge.training_set import RecordedFit
from lightning_tracin.bridge.unmoved import unmoved
from lightning_tracin.checked_numbers import whole_number, whole_number_or_none
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.recording.beginning import begin
from lightning_tracin.recording.behind import BehindModelCheckpoint
from lightning_tracin.recording.log_plan import LogPlan
from lightning_tracin.recording.loggers import check_loggers
from lightning_tracin.recording.plan import (
    Cache,
    OnError,
    RecordingPlan,
    component_numbers,
    examples_to_log,
    local_path,
    methods_to_record,
    projection_sizes,
)
from lightning_tracin.recording.recorder import Recorder
from lightning_tracin.recording.sampled_indices import SampledLoader
from lightning_tracin.results.reader import RawText
from lightning_tracin.scoring.methods import Method
from lightning_tracin.storage.encoding import StorageOptions
from lightning_tracin.storage.trace import Trace


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
        methods: where to take gradients: "tracin-we" (the word embedding table), "tracin-last" (the last layer), and
            dotted names of ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or transformers' ``Conv1D`` layers, in which
            ``*`` stands for anything (``"model.bert.encoder.layer.1.*"``), for :class:`~lightning_tracin.TracInLayer`.
            All are taken in one backward pass. At a linear layer each example's factors at all positions are stored,
            or its gradient as one matrix, whichever is smaller.
        dtype: what gradients are stored in. "float16" scales each row by its own float32 norm: exact to about 1e-3
            of a score however small gradients are. "float32" takes twice the space.
        top_words: store only each example's k words of largest gradient norm, before a method leaves words out
            (``exclude_tokens``) or preconditions.
        projection: a number p stores word gradients projected at random to so many numbers for each word; a pair (a, b)
            stores the gradients of linear layers projected to (a, b) matrices (the gradient at the output to a, the
            input to b), where that is smaller. Norms stay as they are: scores become estimates, self-influence stays
            exact.
        rank: a pair (r, s) stores, of the gradients of layers with several positions (convolutions, linear layers at
            every token), what lies in K-FAC's r leading components of the inputs and s of the output gradients at the
            checkpoint, as a matrix, where that is smaller: for methods with ``precondition="kfac"`` alone. A look at
            200 training examples comes before each pass.
        log_examples: how many validation examples, those of the highest loss, are logged in every validation of the fit
            with the training examples that pushed them; or the indices of those to log from each validation loader (in
            the data set; in the loader's order where that shuffles, is a stream or has a sampler of its own). 0 logs
            none.
        log_k: how many proponents and opponents of each are logged.
        log_method: what scores them: "tracin-we", "tracin-last" or a method object that needs nothing but what
            ``methods`` records. Words say most with
            ``TracInWE(normalize="cosine", exclude_tokens=("special", "common"))``.
        log_texts: the training examples as they were written, by index in the data set, to be shown in the place of
            their tokens; or a dict of the texts of "train" and, where there is one validation loader, of "val".
        on_error: what happens when recording fails in the middle of a fit (a full disk, a folder that is gone). "warn"
            says what, why and what is kept, ends the recording, and lets the fit go on as it would without the
            callback. What goes wrong with ``log_examples`` ends the log alone. A single example without a finite
            gradient counts zero there, is named, and ends nothing. "raise" ends the fit. What is refused before the
            first step is an error in either case.
        overwrite: whether a trace that is already in ``dirpath`` may be replaced.
        keep_weights: False stores no weights, only gradients: ``trainer.self_influence`` (label errors) then works as
            ever, but ``trainer.influence``, which takes the gradients of test examples at each checkpoint's weights, is
            refused, as are gradients at layers that ``methods`` did not name.

    Gradients are of the model as it computes: in the precision of training (16 bits, FSDP's ``mixed_precision``) where
    the fit stores them, in that of the trainer that is asked for test examples. What is done with them is done in full.

    With ``log_examples``, each validation hands a table to all of the trainer's loggers, and the curves
    ``tracin/same_label``, ``tracin/concentration`` and ``tracin/suspected_label_errors`` (see
    :func:`lightning_tracin.recording.validation_log.summary`). Its examples are chosen while it runs, and scored
    before training goes on: by ``log_method``, or at the word embedding table if ``methods`` has it, else at the last
    layer, else at the first that they name; over all checkpoints up to then, that of the same epoch's end included.
    Where there is no checkpoint yet, they wait for the first one. They are logged under the step and epoch of their
    validation. Validation batches must be of the form that ``training_step`` takes. It costs a second forward pass of
    each validation batch (of the batches with the examples, where indices are given; without the mixin, of each example
    by itself). Each validation also takes, for every checkpoint so far, a backward pass of each logged example and one
    reading of the stored gradients: it grows with the number of checkpoints, not with that of validation examples.

    Raises:
        ValueError: on a wrong argument, and before training on a module, a loss or a training set that influence
            cannot be computed for. The message says what to change.
        FileExistsError: if ``dirpath`` holds the trace of another fit and ``overwrite`` is False.
        BlockingIOError: if another fit or query is writing into ``dirpath``.
        OSError: if the disk has not enough space for one checkpoint, before anything is written.

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
        cache: Cache = "checkpoint",
        methods: Sequence[str] = ("tracin-we", "tracin-last"),
        dtype: Dtype = "float16",
        top_words: int | None = None,
        projection: int | tuple[int, int] | None = None,
        rank: tuple[int, int] | None = None,
        log_examples: int | Sequence[int] = 0,
        log_k: int = 3,
        log_method: str | Method | None = None,
        log_texts: Sequence[RawText] | Mapping[str, Sequence[RawText]] | None = None,
        on_error: OnError = "warn",
        overwrite: bool = False,
        keep_weights: bool = True,
    ) -> None:
        self.plan = RecordingPlan(
            dirpath=None if dirpath is None else local_path(dirpath, "dirpath"),
            every_n_epochs=whole_number("every_n_epochs", every_n_epochs),
            every_n_train_steps=whole_number_or_none("every_n_train_steps", every_n_train_steps),
            cache=cache,
            methods=methods_to_record(methods),
            options=StorageOptions(
                dtype,
                whole_number_or_none("top_words", top_words),
                projection_sizes(projection),
                component_numbers(rank),
            ),
            log_examples=examples_to_log(log_examples),
            log_k=whole_number("log_k", log_k),
            log=LogPlan.of(log_method, log_texts),
            on_error=on_error,
            overwrite=overwrite,
            keep_weights=keep_weights,
        )
        self.recorded_fit: RecordedFit | None = None
        self._recorder: Recorder | None = None
        self._sampled: SampledLoader | None = None
        self._fitting = False
        self._behind: BehindModelCheckpoint | None = None
        self._resumed: dict[str, Any] = {}
        self._loaded = False
        self._fit: tuple[Any, Any] | None = None  # weak references to the trainer and the module
        self._stopped: str | None = None
        self._writing = ExitStack()  # holds the folder's lock

    def __getstate__(self) -> dict[str, Any]:
        """What another process is given: the arguments, and nothing of the fits of this one."""
        of_fits = {"recorded_fit": None, "_recorder": None, "_sampled": None, "_behind": None, "_fit": None}
        return {**self.__dict__, **of_fits, "_fitting": False, "_resumed": {}, "_writing": ExitStack()}

    @property
    def trace(self) -> Trace | None:
        """What the last fit in this process recorded."""
        return None if self.recorded_fit is None else self.recorded_fit.trace

    @property
    def state_key(self) -> str:
        """Tells apart the callbacks of one trainer that write to different folders."""
        return f"{type(self).__qualname__}(dirpath={str(self.plan.dirpath)!r})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start afresh for a fit; other stages leave the trace alone."""
        self._fitting = stage == "fit"
        self._fit = weakref.ref(trainer), weakref.ref(pl_module)
        self._recorder = None
        if self.recorded_fit is None and (kept := kept_fits(trainer).get(self.state_key)) is not None:
            self.recorded_fit = kept.fit  # of the callback that this one replaces
        if self._fitting:
            require_strategy(trainer)
            self._check_plan(trainer)
            if trainer.checkpoint_callback is not None:
                self._behind = BehindModelCheckpoint(trainer, self._take_due)
            self._resumed, self._loaded, self._stopped = {}, False, None
            self._sampled = SampledLoader(trainer, needed=self.plan.cache == "training")

    def _check_plan(self, trainer: pl.Trainer) -> None:
        """Check that the trainer can do what is asked for.

        Raises:
            ValueError: if it cannot.
        """
        if self.plan.log_examples and spreads(trainer):
            raise ValueError(
                "log_examples needs whole weights, which FSDP spreads over the processes. Use log_examples=0, and "
                "ask trainer.influence after the fit."
            )
        if self.plan.log_examples:
            check_loggers(trainer.loggers)
        callbacks = [each for each in trainer.callbacks if isinstance(each, TracInCallback)]  # type: ignore[attr-defined]
        if sum(each.plan.cache == "training" for each in callbacks) > 1:
            raise ValueError(
                'A trainer can have one TracInCallback with cache="training", but got several. Use one with all of the '
                'methods, or cache="checkpoint" for the others.'
            )
        if sum(bool(each.plan.log_examples) for each in callbacks) > 1:
            raise ValueError(
                "A trainer can have one TracInCallback with log_examples, but got several: their tables and curves "
                "have the same names, and one's page would replace the other's. Use log_examples=0 for the others, or "
                "one callback with all of the methods, and log_method to choose among them."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to go on with the same trace."""
        if self._recorder is None or self.trace is None:
            return self._state_left()
        return {"trace": self.trace.id, "path": str(self.trace.path.absolute()), **self._recorder.state()}

    def _state_left(self) -> dict[str, Any]:
        """The state of the last fit, if the same trainer fits the same module again: as Lightning counts, it goes on.

        Not that of another fit: tuners save and restore the state of all callbacks, which would then seem resumed.
        """
        trainer, module = (None, None) if self._fit is None else (each() for each in self._fit)
        kept = None if trainer is None else kept_fits(trainer).get(self.state_key)
        return {} if kept is None or kept.module() is not module else kept.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the trace to go on with; only a fit does (predict with a checkpoint restores callbacks too)."""
        if self._fitting:
            self._resumed = state_dict

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the trace of a callback that had another ``dirpath``, if there was one that nobody else has now.

        What stands under this callback's own key comes later, and counts.
        """
        self._loaded = self._fitting
        states = checkpoint.get("callbacks", {})
        taken = {each.state_key for each in trainer.callbacks}  # type: ignore[attr-defined]
        begun = f"{type(self).__qualname__}(dirpath="
        left = [state for key, state in states.items() if key.startswith(begun) and key not in taken]
        if len(left) == 1 and self.state_key not in states:
            self.load_state_dict(left[0])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check all that can be checked on a first batch, and open the trace."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("TracInCallback records nothing in a fast_dev_run.")
            return
        left = self._state_left()
        again = trainer.global_step + left.get("raw_steps", 0) > 0
        resumed = left if again and not self._resumed else self._resumed
        # Steps of the trainer that this callback did not see, unless they were those of another module.
        fitted_before = self.state_key in kept_fits(trainer)
        unseen = not resumed and trainer.global_step > 0 and (self._loaded or not fitted_before)
        with unmoved(trainer.train_dataloader):
            self._recorder = begin(trainer, pl_module, self.plan, resumed, self._writing, unseen=unseen)
        self.recorded_fit = self._recorder.fit
        kept_fits(trainer)[self.state_key] = KeptFit(self.recorded_fit, weakref.ref(pl_module))
        self._take_due(trainer)  # what a fit that was killed has still to take

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check a loader that was made anew."""
        self._record(trainer, lambda recorder: recorder.check_loader(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log a validation that came before, and learn which examples the batch holds."""
        self._record(trainer, lambda recorder: recorder.log_validations(trainer))
        self._record(trainer, lambda recorder: recorder.begin_batch(trainer, batch, self._sampled))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the gradients of a training batch."""
        self._record(trainer, lambda recorder: recorder.end_backward(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Learn that Lightning is about to make a step, and to count it; its rates are noted when it is made."""
        self._record(trainer, lambda recorder: recorder.begin_step(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's gradients, and take a checkpoint if one is due."""
        self._record(trainer, lambda recorder: recorder.end_batch(trainer, batch, self._sampled))
        if self._behind is None:
            self._take_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a checkpoint if one is due."""
        self._record(trainer, lambda recorder: recorder.end_epoch(trainer))
        if self._behind is None:
            self._take_due(trainer)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to choose examples of the validation."""
        self._record(trainer, lambda recorder: recorder.begin_validation(trainer))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at a validation batch, before ``validation_step`` may take it apart."""
        self._record(trainer, lambda recorder: recorder.see_validation_batch(trainer, pl_module, batch, dataloader_idx))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose among the examples that all processes have seen."""
        self._record(trainer, lambda recorder: recorder.end_validation(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last validation, and say so if the fit was too short for a checkpoint."""
        self._record(trainer, lambda recorder: recorder.end(trainer))
        if self._recorder is None and self._stopped is not None:
            rank_zero_warn(f"The trace of this fit is incomplete. {self._stopped}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last checkpoint of a fit that was killed just before: nothing begins where no epoch is left."""
        if self._recorder is None and self._stopped is None and self._resumed.get("due") is not None:
            self.on_train_start(trainer, pl_module)
        if self.recorded_fit is None and self._stopped is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            why = (
                f"TracInCallback recorded nothing: this fit had no step to train (max_epochs={trainer.max_epochs}, "
                f"max_steps={trainer.max_steps}, current_epoch={trainer.current_epoch})."
            )
            if self._resumed:
                rank_zero_warn(
                    f"{why} Raise max_epochs, or ask with trace={self._resumed['path']!r} for what it goes on with."
                )
            else:
                rank_zero_info(why)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the loader and the module as they were, and the folder to others."""
        self._close(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What :meth:`teardown` does, which Lightning does not call after an error."""
        self._close(trainer)

    def _take_due(self, trainer: pl.Trainer) -> None:
        self._record(trainer, lambda recorder: recorder.take_due(trainer))

    def _record(self, trainer: pl.Trainer, act: Callable[[Recorder], None]) -> None:
        """Let the recorder act, if there is one; where it fails, recording ends, and training goes on."""
        if self._recorder is None:
            return
        try:
            act(self._recorder)
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            self._stop(trainer, error)

    def _stop(self, trainer: pl.Trainer, error: Exception) -> None:
        """End the recording, and say what, why, and what is kept."""
        assert self.trace is not None
        assert self._recorder is not None
        step = self._recorder.steps_done(trainer)
        why = f"{type(error).__name__}: {error}".rstrip(".") + "."
        self._stopped = (
            f"TracInCallback stopped recording at step {step}, because of {why} {self._what_is_kept(self.trace)}"
        )
        with suppress(OSError, ValueError):  # The folder may be gone, or the disk full.
            self.trace.mark_incomplete(step, why)
        rank_zero_warn(f'{self._stopped} Training goes on. With on_error="raise" it would end here.')
        self._close(trainer)

    @staticmethod
    def _what_is_kept(trace: Trace) -> str:
        """What can be asked when the recording has ended before the fit."""
        if not trace.checkpoint_folders:
            return f"The trace in {trace.path} has no checkpoint, so that there is nothing to ask."
        return (
            f"What was stored up to the last checkpoint in {trace.path} is complete, and can be asked; what comes "
            "later will be missing from the scores."
        )

    def _close(self, trainer: pl.Trainer) -> None:
        with self._writing:  # let go last
            if self._recorder is not None:
                kept = kept_fits(trainer)
                kept[self.state_key] = replace(kept[self.state_key], state=self.state_dict())
                self._recorder.close()
            if self._sampled is not None:
                self._sampled.close()
            if self._behind is not None:
                self._behind.leave(trainer)
            self._recorder = self._sampled = self._behind = None
