"""The gradients of training examples that a query needs and a fit has not stored: computed now, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl

from lightning_tracin.bridge.collated_order import check_order
from lightning_tracin.bridge.mixin import labels_of_module, words_of_batch
from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.bridge.strategy import require_results
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.bridge.unmoved import unmoved
from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.kronecker import KroneckerFactors
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import full_state_dict, is_fsdp
from lightning_tracin.parallel.processes import Processes, wait_until_visible
from lightning_tracin.querying.asked import has_loader, last_fits, loader_of_datamodule
from lightning_tracin.querying.chosen_checkpoints import chosen_checkpoints
from lightning_tracin.querying.passes import Pass, Query, attribute_set, run_pass
from lightning_tracin.querying.steps import GradientStep
from lightning_tracin.results.excluded_words import with_ids_of
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.terms import terms_at, training_sites_of, warn_if_nothing_counts
from lightning_tracin.storage.checkpoint import Checkpoint, require_weights
from lightning_tracin.storage.lock import locked
from lightning_tracin.storage.own_files import remove_folder, remove_temporary, require_own
from lightning_tracin.storage.sampled_moments import SampledMoments, sampling_order
from lightning_tracin.storage.trace import Trace
from lightning_tracin.storage.training_pass import TrainingPass, reading_order, stored_stream, training_pass


def ready_checkpoints(
    query: Query, module: pl.LightningModule | None, datamodule: pl.LightningDataModule | None, train_dataloaders: Any
) -> list[Checkpoint]:
    """The checkpoints that count, each with the gradients that the method needs; missing ones are computed now.

    Args:
        query: what is asked.
        module: the query's, or None where there is none, which is a mistake if gradients are missing.
        datamodule: that was passed.
        train_dataloaders: that were passed.

    Raises:
        ValueError: if there are no checkpoints, or not those that are asked for, or if model or training set are
            missing or not those of the trace.
    """
    trace, processes = query.trace, query.processes
    with processes.synchronized(), ExitStack() as stack:
        recorded = _checkpoints_of_first(trace, query.method, processes)
        trace.check_whole(recorded)
        checkpoints = chosen_checkpoints(recorded, query.checkpoints)
        sites = _check_recorded(trace, query.method, checkpoints)
        warn_if_nothing_counts(query.method, checkpoints)
        if module is not None:
            state = full_state_dict(module)
            if processes.first or not is_fsdp(module):
                trace.check_model(state, type(module).__name__)
            _check_layers(trace, module)
        missing = [each for each in checkpoints if not all(map(each.has_gradients, sites))]
        require_weights(missing)
        training_set = _training_set(query, datamodule, train_dataloaders, needed=bool(missing))
        if training_set is not None:
            stack.enter_context(unmoved(training_set.loader))
            trace.check_data(len(training_set), training_set.fingerprint())
        if missing and (module is None or training_set is None):
            what = "model (model=...)" if module is None else "training set (train_dataloaders=... or datamodule=...)"
            names = ", ".join(site.name for site in sites)
            raise ValueError(
                f"{len(missing)} of the {len(checkpoints)} checkpoints in {trace.path} have no stored gradients for "
                f"{names}; pass the {what} to compute them."
            )
        if missing and training_set is not None:
            training_set.check_divisible(processes)
            training_set.agree_on_batches(processes)
            check_order(training_set.loader, "training", training_set.looked)
    if missing and module is not None and training_set is not None:
        require_results(query.trainer)
        _fill(query, missing, sites, training_set)
    return checkpoints


def looked_up(query: Query, checkpoints: Sequence[Checkpoint]) -> Query:
    """The same question, with the ids of the tokens that its method leaves out by name.

    Args:
        query: what is asked.
        checkpoints: of :func:`ready_checkpoints`, after which the texts of the training examples are stored.
    """
    with query.processes.synchronized():
        return replace(query, method=with_ids_of(query.method, query.trace, checkpoints, query.tokenizer))


def _check_layers(trace: Trace, module: pl.LightningModule) -> None:
    """Check that a module has the layers at which the trace says that gradients were taken."""
    try:
        sites_on_module(module, trace.sites)
    except ValueError as error:
        raise ValueError(f"The trace in {trace.path} is not of this model, or damaged: {error}") from error


def _training_set(
    query: Query, datamodule: pl.LightningDataModule | None, train_dataloaders: Any, *, needed: bool
) -> TrainingSet | None:
    """The training set that was passed; if it is needed, that of the fit that wrote the trace."""
    if train_dataloaders is not None:
        return TrainingSet(train_dataloaders)
    trainer = query.trainer
    if datamodule is not None and datamodule is not trainer.datamodule and has_loader(datamodule, "train"):  # type: ignore[attr-defined]
        return TrainingSet(loader_of_datamodule(trainer, datamodule, "train", query.processes))
    fits = last_fits(trainer) if needed else []
    return next((each.training_set for each in fits if each.trace.id == query.trace.id), None)


def _checkpoints_of_first(trace: Trace, method: Method, processes: Processes) -> list[Checkpoint]:
    """The trace's checkpoints, when this process sees those, and the gradients there, that the first one sees."""
    sites = training_sites_of(method, trace.sites)
    checkpoints = trace.checkpoints

    def stored() -> list[Any]:
        return [(each.id, [each.has_gradients(site) for site in sites]) for each in checkpoints]

    of_first = processes.gather(stored())[0]

    def seen() -> bool:
        nonlocal checkpoints
        if stored() == of_first:
            return True
        checkpoints = trace.checkpoints
        return bool(stored() == of_first)

    wait_until_visible(seen, f"The first process sees {len(of_first)} checkpoints in {trace.path}")
    return checkpoints


def _check_recorded(trace: Trace, method: Method, checkpoints: Sequence[Checkpoint]) -> list[Site]:
    """Check that the fit recorded what a method needs, as far as it is stored; the sites that it needs."""
    if not checkpoints:
        raise ValueError(f"The trace in {trace.path} has no checkpoint yet: there is nothing to score from.")
    sites = training_sites_of(method, trace.sites)
    for checkpoint in checkpoints:
        terms_at(checkpoint, method)  # raises where the method needs second moments and there are none
        for site in sites:
            if checkpoint.has_gradients(site):
                checkpoint.gradients(site)
    return sites


def _fill(query: Query, missing: Sequence[Checkpoint], sites: Sequence[Site], training_set: TrainingSet) -> None:
    """Compute and store the training examples' gradients at the checkpoints that have none."""
    trace, processes = query.trace, query.processes
    with ExitStack() as contexts:
        with processes.synchronized():
            if processes.first:
                contexts.enter_context(locked(trace.path, within_fit=True))
                trace.check_in_place()
                require_own(trace.path)
                remove_temporary(trace.path, within_fit=True)
            _checkpoints_of_first(trace, query.method, processes)
            # Others may have stored some.
            missing = [each for each in missing if not all(map(each.has_gradients, sites))]
            if processes.first:
                _remove_without_index(trace, [(each, site) for each in missing for site in sites])
        contexts.enter_context(attribute_set(query.trainer, "limit_predict_batches", 1.0))  # every training example
        taken: dict[tuple[Site, ...], ModuleGradients] = {}
        for number, checkpoint in enumerate(missing, start=1):
            with processes.synchronized():
                order = reading_order(trace, training_set, checkpoint.drawn(), processes)
            wanted = tuple(site for site in sites if not checkpoint.has_gradients(site))
            if wanted not in taken:
                taken[wanted] = ModuleGradients(query.module, wanted, recorded=trace.sites)
            factors = _sampled_factors(query, checkpoint, taken[wanted], training_set)
            known = stored_stream(trace) if training_set.iterable else None
            with training_pass(trace, checkpoint, wanted, order, processes, known=known, factors=factors) as filled:

                def take(captured: Captured, _: list[int], batch: Any, filled: TrainingPass = filled) -> None:
                    words = words_of_batch(query.module, batch, filled.unknown_tokens(captured))
                    filled.add(captured, labels_of_module(query.module, batch, len(captured)), words)

                description = f"Training gradients {number}/{len(missing)}"
                loader = training_set.loader_over(order)
                run_pass(query, checkpoint, Pass(loader, GradientStep(taken[wanted]), take, description))


def _remove_without_index(trace: Trace, wanted: Sequence[tuple[Checkpoint, Site]]) -> None:
    """Remove folders of gradients that are to be written anew, as their index is gone (a copy that broke off)."""
    for checkpoint, site in wanted:
        folder = checkpoint.path / site.key
        if folder.is_dir() and not checkpoint.has_gradients(site):
            remove_folder(trace.path, folder)


def _sampled_factors(
    query: Query, checkpoint: Checkpoint, gradients: ModuleGradients, training_set: TrainingSet
) -> dict[Site, KroneckerFactors]:
    """K-FAC's factors at a checkpoint, at those sites that store components, by a pass over a sample."""
    moments = SampledMoments(gradients.sites)
    if not moments.is_needed:
        return {}
    with query.processes.synchronized():
        loader = training_set.loader_over(sampling_order(checkpoint, training_set, query.processes))

    def take(captured: Captured, *_: Any) -> None:
        moments.add(captured)

    run_pass(query, checkpoint, Pass(loader, GradientStep(gradients), take, "K-FAC"))
    with query.processes.synchronized():
        return moments.factors(query.processes)
