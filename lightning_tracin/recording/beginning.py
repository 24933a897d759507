"""What happens before the first step of a fit: all checks that can be made, and the trace begun or gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_tracin.bridge.collated_order import check_order
from lightning_tracin.bridge.mixin import label_names_of, labels_of_module
from lightning_tracin.bridge.module_gradients import inside_fit
from lightning_tracin.bridge.strategy import processes_of
from lightning_tracin.bridge.training_set import RecordedFit, TrainingSet
from lightning_tracin.gradients.eval_mode import zero_weights_filled
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import full_state_dict, require_automatic_optimization, require_spread
from lightning_tracin.parallel.processes import Processes, wait_until_visible
from lightning_tracin.recording.cost import Cost, cost_of, say_cost
from lightning_tracin.recording.drawn import DrawnExamples
from lightning_tracin.recording.first_batch import FirstBatch, look_at_first_batch, stored_sites
from lightning_tracin.recording.loggers import logger_folder
from lightning_tracin.recording.new_labels import NewLabels
from lightning_tracin.recording.noted_steps import NotedSteps
from lightning_tracin.recording.optimizer_steps import OptimizerSteps
from lightning_tracin.recording.plan import RecordingPlan, local_path
from lightning_tracin.recording.recorder import Recorder
from lightning_tracin.recording.space import require_space
from lightning_tracin.recording.training_cache import TrainingCache
from lightning_tracin.recording.training_form import TrainingForm, check_training
from lightning_tracin.recording.validation_log import ValidationLog
from lightning_tracin.storage.known_texts import KnownTexts
from lightning_tracin.storage.layouts import model_fingerprint, shapes_of
from lightning_tracin.storage.lock import locked
from lightning_tracin.storage.own_files import has_trace, require_free, require_own
from lightning_tracin.storage.sampled_moments import require_readable_apart
from lightning_tracin.storage.schemas import Step, TraceHeader
from lightning_tracin.storage.shards import fitting_shard_examples
from lightning_tracin.storage.trace import Trace


@dataclass(frozen=True)
class _Begun:
    """What the checks of a fit that is about to begin found.

    Attributes:
        path: of the trace.
        source: of the trace that a resumed fit goes on with; None for a fit from the start.
        training_set: the fit's.
        fingerprint: of the training set.
        first: what was found on the first batch.
        state: the module's weights, by name.
        cost: of the trace.
        model_class: the module's.
        sites: where gradients are stored.
        form: how training's own gradients are made of those of the examples' losses, where they are used.
    """

    path: Path
    source: Path | None
    training_set: TrainingSet
    fingerprint: str
    first: FirstBatch
    state: Mapping[str, Any]
    cost: Cost
    model_class: str
    sites: tuple[Site, ...]
    form: TrainingForm | None


def begin(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    plan: RecordingPlan,
    resumed: Mapping[str, Any],
    writing: ExitStack,
    *,
    unseen: bool,
) -> Recorder:
    """Check all that can be checked on a first batch, and open the trace.

    It reads the training set, and is called where that is :func:`~lightning_tracin.bridge.unmoved.unmoved`.

    Args:
        trainer: whose fit is about to begin.
        module: the module in training.
        plan: what is asked for.
        resumed: what the callback's state says of the trace to go on with; empty for a fit from the start.
        writing: is given the folder's lock.
        unseen: whether the module was trained before, but nothing is known of a trace of that.

    Raises:
        ValueError: on what influence cannot be computed for; the message says what to change.
        FileExistsError: if the trace of another fit is in the place, and must not be replaced.
        OSError: if the disk has not enough space.
    """
    processes = processes_of(trainer)
    with processes.synchronized():
        begun = _checked(trainer, module, plan, resumed, writing)
    n_raw = 0 if begun.source is None else resumed.get("raw_steps", 0)  # which Lightning does not count
    done = trainer.global_step + n_raw
    with processes.synchronized():
        if begun.source is not None:
            _go_on(begun, begun.source, plan, done, processes)
        elif processes.first:
            late = unseen or bool(resumed)
            Trace.create(begun.path, _header(begun, plan, processes, begun_at=done if late else 0))
    if unseen:
        rank_zero_warn(
            f"This fit goes on at step {done}, but the trace in {begun.path} has nothing to go on with: the "
            "checkpoints before this one will be missing from the scores. Resume from a checkpoint of a fit with "
            "TracInCallback, or fit from the start; of Lightning's own files, Trace.from_checkpoints makes a trace."
        )
    fit = RecordedFit(_opened(begun.path, processes), begun.training_set)
    steps = [] if begun.source is None else _steps_to_go_on_with(fit.trace, resumed, done, processes)
    tolerant = plan.on_error == "warn"
    form, first = begun.form, begun.first
    training = None if form is None else TrainingCache(module, fit.trace, form, processes, tolerant=tolerant)
    recorder = Recorder(
        fit,
        plan,
        first.gradients,
        shapes_of(begun.state),
        trainer.train_dataloader,
        steps=NotedSteps(module, steps, resumed if steps else {}),
        made=OptimizerSteps(trainer, n_raw),
        drawn=DrawnExamples(fit.trace.n_train, processes, resumed if steps else None),
        labels=NewLabels(module, first.batch),
        training=training,
        due=resumed.get("due") if steps else None,
    )
    recorder.validations = _validations(trainer, recorder, plan)
    recorder.first_of_stream = _first_of_stream(module, begun.training_set, first)
    return recorder


def _checked(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    plan: RecordingPlan,
    resumed: Mapping[str, Any],
    writing: ExitStack,
) -> _Begun:
    """What is found by all checks, in the order of what they cost; says what the trace will take."""
    processes = processes_of(trainer)
    require_spread(module)
    require_automatic_optimization(module)
    _require_learning_rates(trainer)
    label_names_of(module)  # which only a question reads; but what is wrong with them is told before training
    path = _locked_path(trainer, plan, processes, writing)
    source = processes.gather(_source(path, plan, resumed) if processes.first else None)[0]
    training_set = TrainingSet(trainer.train_dataloader)
    training_set.agree_on_batches(processes)
    if plan.options.rank is not None:
        require_readable_apart(training_set)
    if plan.cache != "on_demand":
        training_set.check_divisible(processes)
    fingerprint = training_set.fingerprint()
    training_set.warn_of_unseen()
    processes.require_same("training sets", fingerprint)
    check_order(training_set.loader, "training", training_set.looked)
    first = look_at_first_batch(trainer, module, training_set, plan.methods, compared=plan.cache != "training")
    state = full_state_dict(module)
    cost = cost_of(trainer, plan, state, first, training_set)
    sites = stored_sites(first, plan.options, cost.layers)
    plan.log.check(sites, module, trainer.optimizers, len(training_set))
    form = _training_form(trainer, module, first) if plan.cache == "training" else None
    if processes.first:
        require_space(trainer, plan, path, cost, training_set)
    say_cost(plan, path, cost, first)
    return _Begun(path, source, training_set, fingerprint, first, state, cost, type(module).__name__, sites, form)


def _require_learning_rates(trainer: pl.Trainer) -> None:
    """Check that the optimizers have learning rates, by which checkpoints count.

    Raises:
        ValueError: if one has none, as Adafactor with relative steps.
    """
    for optimizer in trainer.optimizers:
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(
                f"{type(optimizer).__name__} finds its learning rates by itself (lr=None), but scores are weighted by "
                "them. Give it one, as in Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)."
            )


def _header(begun: _Begun, plan: RecordingPlan, processes: Processes, *, begun_at: int) -> TraceHeader:
    """What a new trace is of.

    Args:
        begun: what the checks found.
        plan: what is asked for.
        processes: those of the fit.
        begun_at: the steps that training had done before, of which the trace has nothing.
    """
    notes = (f"The trace is incomplete. It begins at step {begun_at} of training: scores lack what came before.",)
    per_example = sum(begun.cost.size.gradients.values())
    return TraceHeader(
        n_train=len(begun.training_set),
        data_fingerprint=begun.fingerprint,
        model_fingerprint=model_fingerprint(begun.state),
        model_class=begun.model_class,
        sites=begun.sites,
        dtype=plan.options.dtype,
        shard_examples=fitting_shard_examples(per_example, len(begun.training_set), processes),
        notes=notes if begun_at else (),
    )


def _go_on(begun: _Begun, source: Path, plan: RecordingPlan, done: int, processes: Processes) -> None:
    """Make the trace of the fit that this one resumes one that goes on after the steps which that had done."""
    trace = Trace(source)
    trace.check_data(len(begun.training_set), begun.fingerprint)
    if processes.first:
        trace.check_model(begun.state, begun.model_class)
    _require_same_sites(trace, begun.sites, plan)
    if processes.first and source == begun.path:
        trace.drop_checkpoints_after(done)
    elif processes.first:
        trace.branch(begun.path, done)


def _training_form(trainer: pl.Trainer, module: pl.LightningModule, first: FirstBatch) -> TrainingForm:
    """How training's own gradients are made of those of the examples' losses, if they can be used."""
    _require_whole_epoch(trainer)
    with inside_fit(trainer, module), zero_weights_filled(module):
        return check_training(first.gradients, first.batch, first.captured)


def _first_of_stream(module: pl.LightningModule, training_set: TrainingSet, first: FirstBatch) -> KnownTexts | None:
    """A stream's first examples, as they were before training."""
    if not training_set.iterable:
        return None
    labels = labels_of_module(module, first.batch, len(first.captured))
    return KnownTexts([first.captured.texts(labels)])


def _validations(trainer: pl.Trainer, recorder: Recorder, plan: RecordingPlan) -> ValidationLog | None:
    """What logs validations, if that is asked for and there will be any."""
    if not plan.log_examples:
        return None
    if not trainer.loggers or not trainer.enable_validation:
        missing = "the fit has no validation" if trainer.loggers else "the trainer has no logger"
        rank_zero_warn(f"log_examples has no effect: {missing}.")
        return None
    return ValidationLog(recorder.fit.trace, recorder.gradients, plan)


def _locked_path(trainer: pl.Trainer, plan: RecordingPlan, processes: Processes, writing: ExitStack) -> Path:
    """The folder of the trace, the same for all processes, which the first one locks until the fit is left."""
    path = _path(trainer, plan)
    if processes.size > 1:  # each may be told another version by its logger, or run in another folder
        path = processes.gather(path.absolute())[0]
    writing.close()  # of a fit that another callback kept from telling that it ended
    if processes.first:
        writing.enter_context(locked(path))
    return path


def _path(trainer: pl.Trainer, plan: RecordingPlan) -> Path:
    """The folder of the trace: as given, or where ModelCheckpoint would put its own.

    Raises:
        ValueError: if that is no folder of a file system.
    """
    if plan.dirpath is not None:
        return plan.dirpath
    root = local_path(trainer.default_root_dir, "default_root_dir of the trainer")
    if not trainer.loggers:
        return root / "trace"
    logger = trainer.loggers[0]
    local_path(logger.save_dir or root, f"folder of {type(logger).__name__}")
    return logger_folder(logger, trainer.default_root_dir) / "trace"


def _source(path: Path, plan: RecordingPlan, resumed: Mapping[str, Any]) -> Path | None:
    """The folder of the trace that a resumed fit goes on with: in its place, or in another where it branches off.

    Raises:
        FileExistsError: if what is in the place must not be replaced: the trace of another fit, or files of others.
    """
    if resumed and has_trace(path) and Trace(path).id == resumed["trace"]:
        require_own(path)
        return path
    require_free(path)
    if has_trace(path) and not plan.overwrite:
        raise FileExistsError(
            f"{path.absolute()} holds the trace of another fit. Pass another dirpath, or overwrite=True to replace it; "
            "a fit that is resumed with ckpt_path continues its own trace."
        )
    if not resumed:
        return None
    source = Path(resumed["path"])
    if has_trace(source) and Trace(source).id == resumed["trace"]:
        return source
    rank_zero_warn(
        f"This fit is resumed, but the trace that it began is not in {source} any more: the checkpoints before this "
        "one will be missing from the scores."
    )
    return None


def _require_same_sites(trace: Trace, sites: tuple[Site, ...], plan: RecordingPlan) -> None:
    """Check that a fit goes on with a trace with the arguments that it was begun with.

    Which shape takes less space at a linear layer was decided when the trace was begun. Another first batch, such as
    one with other words masked, might decide otherwise, so that the shape itself is not compared.

    Raises:
        ValueError: if it does not.
    """
    if trace.dtype == plan.options.dtype and _asked_for(trace.sites) == _asked_for(sites):
        smaller = {(site.projection, site.rank) for site in (*trace.sites, *sites) if site.shape == "matrix"}
        if len(smaller) < 2:
            return
    raise ValueError(
        f"The trace in {trace.path} was begun with {trace.dtype} gradients at {_listed(trace.sites)}, but this fit "
        f"would go on with {plan.options.dtype} gradients at {_listed(sites)}. Resume with the same arguments."
    )


def _asked_for(sites: tuple[Site, ...]) -> list[Site]:
    """Sites without the shape that was chosen for linear layers, and without what earlier versions did not tell."""
    plain: dict[str, Any] = {"shape": "factors", "projection": None, "has_bias": None, "rank": None}
    return [site if site.has_words else replace(site, **plain) for site in sites]


def _listed(sites: tuple[Site, ...]) -> str:
    """Sites in words."""
    listed = []
    for site in sites:
        options = {"top_words": site.top_words, "projection": site.projection, "rank": site.rank}
        named = [f"{name}={value}" for name, value in options.items() if value]
        listed.append(f"{site.layer} ({', '.join(named)})" if named else site.layer)
    return ", ".join(listed)


def _steps_to_go_on_with(trace: Trace, resumed: Mapping[str, Any], done: int, processes: Processes) -> list[Step]:
    """The optimizer steps since the last checkpoint that is still there, up to the last that was done."""
    last = processes.gather(max((each.step for each in trace.checkpoints), default=0))[0]
    return [tuple(step) for step in resumed["steps"] if last <= step[0] < done]


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
    with processes.synchronized():

        def seen() -> bool:
            return has_trace(path) and Trace(path).id == begun

        wait_until_visible(seen, f"The first process has begun a trace in {path.absolute()}")
        return Trace(path)
