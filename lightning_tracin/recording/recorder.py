"""Recorder: what lives from the first step of a fit to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.bridge.compat import at_step, batch_to_device, learns_nothing
from lightning_tracin.bridge.mixin import labels_of_module, words_of_batch
from lightning_tracin.bridge.module_gradients import ModuleGradients, inside_fit
from lightning_tracin.bridge.progress import progress_task
from lightning_tracin.bridge.strategy import processes_of
from lightning_tracin.bridge.training_set import RecordedFit, TrainingSet
from lightning_tracin.bridge.unmoved import unmoved
from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.precision import without_autocast
from lightning_tracin.parallel.fsdp import is_fsdp, synchronized_batches
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.recording.drawn import DrawnExamples
from lightning_tracin.recording.new_labels import NewLabels
from lightning_tracin.recording.noted_steps import NotedSteps
from lightning_tracin.recording.optimizer_steps import OptimizerSteps, unmoved_by
from lightning_tracin.recording.plan import RecordingPlan
from lightning_tracin.recording.sampled_indices import SampledLoader
from lightning_tracin.recording.training_cache import TrainingCache
from lightning_tracin.recording.training_form import check_training, divisor_of, warn_of_another_loss
from lightning_tracin.recording.validation_log import ValidationLog
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.known_texts import KnownTexts
from lightning_tracin.storage.recorded_checkpoint import new_checkpoint
from lightning_tracin.storage.sampled_moments import SampledMoments, sampling_order
from lightning_tracin.storage.training_pass import reading_order, stored_stream, training_pass


class Recorder:
    """Records learning rates, checkpoints and gradients of one fit.

    Args:
        fit: the trace, and the training set that it is of.
        plan: what is asked for.
        gradients: takes those of the module in training.
        shapes: those of the module's state dict, by name.
        loader: the training loader that was looked at.
        steps: optimizer steps since the last checkpoint.
        made: notices the steps of the optimizers.
        drawn: the examples that were trained on since the last checkpoint.
        labels: those that have been looked at.
        training: collects what training computes, if that is to be stored.
        due: the epoch whose checkpoint the fit had yet to take when it was killed, if any.
    """

    def __init__(
        self,
        fit: RecordedFit,
        plan: RecordingPlan,
        gradients: ModuleGradients,
        shapes: Mapping[str, tuple[int, ...]],
        loader: Any,
        *,
        steps: NotedSteps,
        made: OptimizerSteps,
        drawn: DrawnExamples,
        labels: NewLabels,
        training: TrainingCache | None = None,
        due: int | None = None,
    ) -> None:
        self.fit = fit
        self._noted = steps
        self.training = training
        self.validations: ValidationLog | None = None
        self.first_of_stream: KnownTexts | None = None
        self._plan = plan
        self.gradients = gradients
        self._site_layers = sites_on_module(gradients.module, fit.trace.sites)
        self._shapes = shapes
        self._loader = loader
        self._made = made
        self._without_gradient: list[str] | None = None
        self._drawn = drawn
        self._due = due
        self._killed = due is not None
        self._labels = labels
        self._indices: list[int] | None = None
        self._learned = False
        self._without_loss = False
        self._failure: Exception | None = None
        self._log_failure: Exception | None = None
        recorded = fit.trace.checkpoints
        self._previous = recorded[-1].id if recorded else None
        made.watch(self._step_made)

    def check_loader(self, trainer: pl.Trainer) -> None:
        """Check that a loader made anew (``reload_dataloaders_every_n_epochs``) is of the same training set.

        Raises:
            ValueError: if it is not.
        """
        if trainer.train_dataloader is self._loader:
            return
        with processes_of(trainer).synchronized(), unmoved(trainer.train_dataloader):
            self._loader = trainer.train_dataloader
            _require_same(TrainingSet(self._loader), self.fit, trainer.current_epoch)

    def begin_batch(self, trainer: pl.Trainer, batch: Any, sampled: SampledLoader | None) -> None:
        """Learn which examples a training batch holds."""
        with self._held_back(trainer):
            self._check_labels(trainer, batch)
            self._indices = None if sampled is None else sampled.next_batch()
            self._learned = not trainer.lightning_module.automatic_optimization
            if self.training is not None:
                self.training.begin(self._indices or [], batch)

    def _check_labels(self, trainer: pl.Trainer, batch: Any) -> None:
        """Check what was checked before training again, on a batch with labels that none before it had."""
        module = self.gradients.module
        new = self._labels.of(batch)
        if not new or is_fsdp(module):
            return
        with inside_fit(trainer, module):
            captured = self.gradients.capture(batch)
            if captured.first_not_finite() is not None:
                return  # which the pass names, or training's own gradients do
            self._labels.check(batch, captured.losses, new)
            if self.training is not None:
                check_training(self.gradients, batch, captured)
            else:
                warn_of_another_loss(self.gradients, batch, captured)
        self._labels.add(new)

    def end_backward(self, trainer: pl.Trainer) -> None:
        """Take the gradients of a training batch."""
        self._learned = True
        if self.training is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            divisor, scaled = divisor_of(trainer.accumulate_grad_batches, scaler)
            self.training.backward_ended(divisor=divisor, scaled=scaled)

    def steps_done(self, trainer: pl.Trainer) -> int:
        """The optimizer steps of the fit, those included that Lightning does not count."""
        return trainer.global_step + self._made.n_uncounted

    def begin_step(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Lightning is about to make an optimizer step, whose rates later hooks may still change."""
        if learns_nothing(trainer):
            return
        optimizer = _unwrapped(optimizer)
        self._without_gradient = unmoved_by(optimizer, self._site_layers, self.gradients.module)
        if not self._made.announce(optimizer):
            self._note_step(trainer, optimizer)

    def _step_made(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Note a step that was made; what fails is told after the batch, not in the middle of a step."""
        try:
            self._note_step(trainer, optimizer)
        except Exception as error:
            self._failure = self._failure or error

    def _note_step(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rates of an optimizer step, and the sites that it left where they are."""
        number = next((i for i, each in enumerate(trainer.optimizers) if _unwrapped(each) is optimizer), 0)
        before, self._without_gradient = self._without_gradient, None
        if before is None or any(each.grad is not None for group in optimizer.param_groups for each in group["params"]):
            unmoved = unmoved_by(optimizer, self._site_layers, self.gradients.module)
        else:
            unmoved = before  # it has cleared all gradients itself, so that they tell nothing any more
        self._noted.add(self.steps_done(trainer), number, optimizer, unmoved)

    def end_batch(self, trainer: pl.Trainer, batch: Any, sampled: SampledLoader | None) -> None:
        """Keep a training batch's gradients, and note whether a checkpoint is due by ``every_n_train_steps``."""
        with self._held_back(trainer):
            self._raise_failure()
            if batch is None and sampled is not None:  # skipped: Lightning has not called on_train_batch_start
                sampled.next_batch()
            elif self._learned:
                self._drawn.add(self._indices)
            if self.training is not None:
                self.training.end()
        every, made = self._plan.every_n_train_steps, self._noted.steps
        if every is not None and made and self.steps_done(trainer) // every > made[0][0] // every:
            self._due = trainer.current_epoch

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Note whether a checkpoint is due by ``every_n_epochs``."""
        plan = self._plan
        if plan.every_n_train_steps is None and (trainer.current_epoch + 1) % plan.every_n_epochs == 0:
            self._due = trainer.current_epoch

    def take_due(self, trainer: pl.Trainer) -> None:
        """Take a checkpoint if one is due."""
        (epoch, self._due), (killed, self._killed) = (self._due, None), (self._killed, False)
        if epoch is not None and self._noted.steps:  # else nothing was trained since the last one
            self._take_checkpoint(trainer, epoch, killed=killed)

    def begin_validation(self, trainer: pl.Trainer) -> None:
        """Begin to choose examples of a validation."""
        if self.validations is not None and self._log_failure is None:
            with self._logging(trainer, together=False):
                self.validations.begin(trainer)

    def see_validation_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, dataloader_idx: int
    ) -> None:
        """Look at a validation batch."""
        if self.validations is not None and self._log_failure is None:
            with self._logging(trainer, together=False), inside_fit(trainer, module), torch.no_grad():
                self.validations.see(batch, dataloader_idx)

    def end_validation(self, trainer: pl.Trainer) -> None:
        """Choose among the examples that all processes have seen."""
        if self.validations is not None:
            with self._logging(trainer, together=True), processes_of(trainer).synchronized():
                if self._log_failure is not None:
                    raise self._log_failure
                self.validations.end(trainer)

    def log_validations(self, trainer: pl.Trainer) -> None:
        """Log the validations that are due: at the weights of each checkpoint in turn, training's own put back."""
        if self.validations is not None:
            with self._logging(trainer, together=True):
                self.validations.log(trainer)

    def end(self, trainer: pl.Trainer) -> None:
        """Log the last validation, and say so if the fit was too short for a checkpoint."""
        self.log_validations(trainer)
        if self.validations is not None:
            with self._logging(trainer, together=True):
                self.validations.log_page(trainer)
        if not self.fit.trace.checkpoints and not self._noted.steps and self._made.announced:
            rank_zero_warn(
                "No optimizer step of this fit was made, so there is no checkpoint and nothing to compute influence "
                "from. The loss scale of fp16 skips steps whose gradients are not finite: look at the loss, or train "
                'in precision="bf16-mixed".'
            )
        elif not self.fit.trace.checkpoints and not self._noted.steps:
            rank_zero_warn(
                "TracInCallback saw no optimizer step in this fit, so there is no checkpoint and nothing to compute "
                "influence from. Step the optimizers that configure_optimizers returned, by self.optimizers()."
            )
        elif not self.fit.trace.checkpoints and not self._without_loss:
            rank_zero_warn(
                f"The fit ended before the first checkpoint of the trace in {self.fit.trace.path} was due: there is "
                "nothing to compute influence from. Lower every_n_epochs or every_n_train_steps."
            )

    def state(self) -> dict[str, Any]:
        """What a fit that is resumed here needs to know."""
        made = {**self._noted.state(), "raw_steps": self._made.n_uncounted}
        return {**made, "due": self._due, **self._drawn.state()}

    def close(self) -> None:
        """Leave the module as it was."""
        if self.training is not None:
            self.training.close()
        self._made.close()

    @contextmanager
    def _logging(self, trainer: pl.Trainer, *, together: bool) -> Iterator[None]:
        """Let a fault of the log, which is an extra, end the log alone.

        Args:
            trainer: whose fit it is.
            together: whether all processes come to the fault at once; else it waits until they do.
        """
        try:
            yield
        except Exception as error:
            if not together and trainer.world_size > 1:
                self._log_failure = error
                return
            if self._plan.on_error == "raise":
                raise
            self.validations = None
            why = f"{type(error).__name__}: {error}".rstrip(".")
            rank_zero_warn(
                f"log_examples stopped at step {self.steps_done(trainer)}, because of {why}. No further validation of "
                'this fit is logged; recording and training go on. With on_error="raise" the fit would end here.'
            )

    @contextmanager
    def _held_back(self, trainer: pl.Trainer) -> Iterator[None]:
        """With several processes, keep an error until the next checkpoint, where all of them hear of it.

        Raised in the middle of training, it would leave the others to wait for a gradient.
        """
        try:
            yield
        except Exception as error:
            if trainer.world_size == 1:
                raise
            self._failure = self._failure or error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _take_checkpoint(self, trainer: pl.Trainer, epoch: int, *, killed: bool) -> None:
        """Take a checkpoint; of a fit that was killed, what training gave went with its process."""
        step = self.steps_done(trainer)
        optimizers = [_unwrapped(each) for each in trainer.optimizers]
        processes = processes_of(trainer)
        with processes.synchronized():  # before any of them waits for the others
            self._raise_failure()
        drawn = self._drawn.of_all()
        if drawn is not None and not drawn.any():
            self._warn_of_no_loss(step)
            return
        n_recorded = 0 if self.training is None else self.training.count_recorded()
        by_pass = self._plan.cache == "checkpoint" or (killed and self.training is not None)
        if by_pass and self.training is not None:
            rank_zero_warn(
                f"This fit was killed before the gradients of training up to step {step} were stored: those at the "
                "checkpoint's weights are stored in their place."
            )
        elif self.training is not None and not n_recorded:
            rank_zero_warn(
                f"No training batch has given finite gradients up to step {step}, so there is no checkpoint of it. "
                "That is usual while an fp16 loss scale is being found; otherwise look at the learning rate."
            )
            return
        steps, groups = self._noted.of_checkpoint(optimizers)
        with new_checkpoint(
            self.fit.trace,
            self.gradients.module,
            optimizers,
            step=step,
            epoch=epoch,
            previous=self._previous,
            steps=steps,
            groups=groups,
            drawn=drawn,
            keep_weights=self._plan.keep_weights,
            shapes=self._shapes,
            processes=processes,
        ) as checkpoint:
            if by_pass:
                with at_step(trainer, step, epoch):  # what a question in another process says
                    self._store_gradients(trainer, checkpoint, processes)
            elif self.training is not None:
                self.training.store(checkpoint, n_recorded)
            recorded = checkpoint.id
        self._previous = recorded
        self._noted.clear()
        self._drawn.clear()
        self.log_validations(trainer)

    def _warn_of_no_loss(self, step: int) -> None:
        self._without_loss = True
        rank_zero_warn(
            f"training_step of {type(self.gradients.module).__name__} has returned no loss since the last checkpoint, "
            f"up to step {step}: nothing was learned, so there is no checkpoint of it. A model of transformers returns "
            "a loss only for a batch with 'labels'."
        )

    def _store_gradients(self, trainer: pl.Trainer, checkpoint: Checkpoint, processes: Processes) -> None:
        """Store every training example's gradients at the module's present weights."""
        trace, training_set, module = self.fit.trace, self.fit.training_set, self.gradients.module
        moments = SampledMoments(trace.sites)
        if moments.is_needed:
            sample = sampling_order(checkpoint, training_set, processes)
            self._read(trainer, sample, "K-FAC", lambda _, captured: moments.add(captured))
        order = reading_order(trace, training_set, checkpoint.drawn(), processes)
        tolerant = self._plan.on_error == "warn"
        known = (stored_stream(trace) or self.first_of_stream) if training_set.iterable else None
        options: dict[str, Any] = {"tolerant": tolerant, "known": known, "factors": moments.factors(processes)}
        with training_pass(trace, checkpoint, trace.sites, order, processes, **options) as filled:

            def add(batch: Any, captured: Captured) -> None:
                words = words_of_batch(module, batch, filled.unknown_tokens(captured))
                filled.add(captured, labels_of_module(module, batch, len(captured)), words)

            self._read(trainer, order, "TracIn gradients", add)

    def _read(
        self, trainer: pl.Trainer, order: Sequence[int], title: str, take: Callable[[Any, Captured], None]
    ) -> None:
        """Hand on each batch of some training examples, and its gradients at the module's present weights."""
        training_set, module, processes = self.fit.training_set, self.gradients.module, processes_of(trainer)
        loader, fsdp = training_set.loader_over(order), is_fsdp(module)
        with (
            progress_task(trainer.progress_bar_callback, title, len(loader)) as advance,
            _buffers_of_first(module, processes),
            unmoved(training_set.loader),
            inside_fit(trainer, module),
        ):
            # Iterating a loader draws a base seed, so it starts inside the random-state guard.
            batches: Iterable[tuple[Any, bool]] = zip(loader, repeat(True))
            if fsdp:
                batches = synchronized_batches(loader, len(loader), training_set.first_batch, processes)
            for batch, own in batches:
                batch = batch_to_device(trainer, module, batch)
                captured = self.gradients.capture(batch)
                with processes.synchronized() if fsdp else nullcontext():  # none leaves the others to wait for a weight
                    if own:
                        with without_autocast():
                            take(batch, captured)
                        advance()


@contextmanager
def _buffers_of_first(module: torch.nn.Module, processes: Processes) -> Iterator[None]:
    """Lend a module the first process's buffers, which are recorded: under DDP they differ between forward passes."""
    own: list[tuple[Tensor, Tensor]] = []
    if processes.size > 1:
        named = dict(module.named_buffers())
        own_buffers = {name: buffer.cpu() for name, buffer in named.items()} if processes.first else {}
        of_first = processes.gather(own_buffers)[0]
        for name in () if processes.first else named.keys() & of_first.keys():
            own.append((named[name], named[name].clone()))
            named[name].copy_(of_first[name])
    try:
        yield
    finally:
        for buffer, value in own:
            buffer.copy_(value)


def _require_same(training_set: TrainingSet, fit: RecordedFit, epoch: int) -> None:
    """Check that the training set of a later epoch is that which a trace was begun with.

    Raises:
        ValueError: if it is not.
    """
    trace = fit.trace
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
