"""``influence`` and ``self_influence``: what a Trainer is asked after a fit, in this process or in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.bridge.queries import Queries, result_of, weights_kept
from lightning_tracin.bridge.query_examples import example_blocks
from lightning_tracin.bridge.strategy import launched, require_results
from lightning_tracin.bridge.target_names import require_known
from lightning_tracin.bridge.targets import OtherExamples
from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.gradients.rows import DTYPES
from lightning_tracin.gradients.targets import Asked, Positions, Target
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.querying.asked import (
    attached_datamodule,
    datamodule_asked,
    module_asked,
    spread_weights,
    trace_asked,
)
from lightning_tracin.querying.asked_examples import AskedExamples, examples_asked, told_by_loader
from lightning_tracin.querying.chosen_checkpoints import CheckpointChoice, chosen_checkpoints
from lightning_tracin.querying.filling import looked_up, ready_checkpoints
from lightning_tracin.querying.passes import Pass, Query, run_pass
from lightning_tracin.querying.steps import GradientStep, PredictionStep
from lightning_tracin.querying.training import Training, ready_training
from lightning_tracin.querying.undisturbed import left_as_found, require_idle, tokenizer_lent
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.kernels import kernels_of, require_kernels
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of, require_not_constant
from lightning_tracin.scoring.ridge_scores import self_influence_of
from lightning_tracin.scoring.score import lacks_scales, with_scales
from lightning_tracin.scoring.strongest import clipped_k
from lightning_tracin.scoring.terms import sites_of
from lightning_tracin.scoring.within_classes import within_classes_of
from lightning_tracin.storage.checkpoint import Checkpoint, require_weights, undrawn
from lightning_tracin.storage.scratch import Scratch
from lightning_tracin.storage.trace import Trace

_BLOCK_BYTES = 512 * 2**20  # of test gradients, at all checkpoints, that are in memory at once


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
    target: Asked = "label",
    positions: Positions | None = None,
    checkpoints: CheckpointChoice = None,
) -> InfluenceResult:
    """Score every training example's influence on every test example.

    Works with the trainers of ``pytorch_lightning`` and ``lightning.pytorch``. The model's weights, the random number
    generators and the trainer's metrics are afterwards as they were.

    Args:
        trainer: runs the test examples through the model, on its own device and precision.
        dataloaders: the test examples: a loader of batches that ``training_step`` takes, or several in a list or a
            mapping; a datamodule; or texts, rows, a data set, which are tokenised and collated as in training. By
            default those of ``datamodule``, or of the fit's own.
        model: the trained module, or a Hugging Face model; by default that of the last fit in this process.
        datamodule: gives ``test_dataloader`` and ``train_dataloader`` where loaders are not passed.
        train_dataloaders: one loader of the training set of the fit. It is needed only where gradients are not
            stored yet (``cache="on_demand"``); by default that of the last fit in this process. Or a datamodule.
        trace: what the fit recorded, or its folder; by default that of the last fit in this process.
        method: "tracin-we", "tracin-last", or a :class:`TracInWE`, :class:`TracInLast`, :class:`TracInLayer`,
            :class:`TracInSum` or :class:`TracInRidge` with options.
        k: keep only the k strongest proponents and opponents of each test example. Memory then does not grow with
            the training set.
        target: what of a test example is explained. A positive score always means that training made it likelier:
            "label", the example's own (its loss); "prediction", what the model says at the last checkpoint: its class,
            set of classes, tags or tokens, answer, or its value; a class by its number or name, which may not be the
            label; or two of them, the first against the second (log p of the one minus log p of the other). All but
            "label" serve examples without labels.
        positions: of the tokens that are explained, counted in an example from 0: the same for all test examples, or
            a sequence for each by its index in the data set; with several loaders, a mapping of their names to such.
            All that have a label by default. For models that say something of each token.
        checkpoints: which of the trace's count: all by default, "last", a step, several steps, or a slice of their
            list. Predictions are those at the last of them. An example that no batch held in the steps that led to one
            of them is no training example there.

    Returns:
        Scores, one row for each test example in the order of the test data set; of several, one after the other.

    Raises:
        TypeError: if one of them is not of its kind.
        ValueError: if the model or the training set is not that of the trace, if the target does not fit what the
            model says, or labels are missing, if a loader is empty, if it is not known how to make batches of test
            examples, if gradients are not finite, if there is nothing to score from (no checkpoint, or none with
            weights), or if the trainer is in the middle of a fit. The message says what to do.
        BlockingIOError: if gradients are missing, and a fit or another query is writing into the trace.

    Warns:
        UserWarning: if all scores are 0 because checkpoints count by a learning rate that was always 0.
    """
    chosen, explained = method_of(method), Target.of(target, positions)
    k = None if k is None else whole_number("k", k)
    require_idle(trainer)
    require_results(trainer)
    datamodule, dataloaders, train_dataloaders = datamodule_asked(datamodule, dataloaders, train_dataloaders)
    with left_as_found(trainer):
        processes = launched(trainer)
        with processes.synchronized():
            module = module_asked(trainer, model, dataloaders, train_dataloaders)
            opened = trace_asked(trainer, trace)
            require_known(explained, module)
            counted = chosen_checkpoints(opened.checkpoints, checkpoints)
            require_weights(counted)
            require_kernels(chosen, counted, processes)
            n_kept = None if k is None else clipped_k(k, opened.n_train - len(undrawn(counted)))
            hooks = datamodule or attached_datamodule(trainer, module)
            query = Query(trainer, module, opened, chosen, hooks, processes, checkpoints)
            asked = examples_asked(query, dataloaders, train_dataloaders)
            explained_of = explained.for_loaders([each.name for each in asked])
        spread_weights(trainer, module, asked[0].loader, datamodule)
        scratch = Scratch()
        answered: list[Queries] = []
        gradients: list[list[WordGradients]] = []
        owners: list[int] = []  # of each test example, the number of its loader
        with weights_kept(module), tokenizer_lent(module, hooks):
            ready = ready_checkpoints(query, module, datamodule, train_dataloaders)
            query = looked_up(query, ready)
            loaders = _blocks(query, ready, asked)
            device = trainer.strategy.root_device
            kernels = kernels_of(query.method, processes, device, keep=len(loaders) > 1)

            def taken(number: int) -> Queries:
                owner, loader = loaders[number]
                name = f", block {number + 1}/{len(loaders)}" if len(loaders) > 1 else ""
                return _taken(query, ready, loader, name, explained_of[owner])

            firsts = {number: taken(number) for number in _first_blocks(loaders)} if lacks_scales(query.method) else {}
            if firsts:  # a sum is divided by what these say, whichever loader comes first
                with processes.synchronized():
                    tests = [block.tests for block in firsts.values()]
                    query = replace(query, method=with_scales(query.method, tests, processes, device))
            for number, (owner, _) in enumerate(loaders):
                block = firsts.pop(number, None) or taken(number)
                block.method = query.method
                with processes.synchronized():
                    block.score(n_kept, processes, device, kernels=kernels)
                words = block.word_gradients()
                gradients.append([scratch.put(each) for each in words] if len(loaders) > 1 else words)
                block.drop_gradients()
                answered.append(block)
                owners += [owner] * len(block.indices)
            result = replace(result_of(answered, gradients, scratch), target=str(explained))
        return told_by_loader(result, asked, owners)


def self_influence(
    trainer: pl.Trainer,
    model: pl.LightningModule | None = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    train_dataloaders: Any = None,
    trace: str | Path | Trace | None = None,
    method: str | Method = "tracin-we",
    checkpoints: CheckpointChoice = None,
    within_class: bool = False,
) -> Tensor:
    """Every training example's influence on itself: high for mislabelled and for atypical examples.

    Args:
        trainer: as for :func:`influence`, like all that follow.
        model: needed only where gradients are not stored yet.
        datamodule: see :func:`influence`.
        train_dataloaders: see :func:`influence`.
        trace: see :func:`influence`.
        method: see :func:`influence`.
        checkpoints: see :func:`influence`.
        within_class: compare with examples of the same label: how many standard deviations an example's self-influence
            is above their mean. It shows what is atypical of each class where one class has higher values than
            another; flipped labels are found better without.

    Returns:
        (n_train,) float32: the diagonal of the training examples' scores on themselves; with ``within_class`` NaN for
        examples without a label, or that training never drew.

    Raises:
        ValueError: see :func:`influence`; or if it is the same for every example, as with ``normalize="cosine"``;
            or if there are no classes to compare within.
        BlockingIOError: see :func:`influence`.
    """
    chosen = method_of(method)
    require_not_constant(chosen)
    training = Training(model, datamodule, train_dataloaders, trace, checkpoints)
    with left_as_found(trainer):
        query, ready = ready_training(trainer, chosen, training)
        with query.processes.synchronized():
            found = self_influence_of(ready, query.method, query.processes)
            return within_classes_of(query.trace, ready, found) if within_class else found


def _taken(query: Query, checkpoints: Sequence[Checkpoint], loader: Any, block_name: str, target: Target) -> Queries:
    """A block of test examples, with their gradients; its name follows the checkpoint's number in the progress bar."""
    test = Queries(query.module, query.method, query.trace, target)
    sites = sites_of(query.method, query.trace.sites)
    if target.what == "prediction":
        said = PredictionStep(query.module, test.targets)
        run_pass(query, checkpoints[-1], Pass(loader, said, _nothing_taken, f"Predictions{block_name}"))
    step = GradientStep(ModuleGradients(query.module, sites, recorded=query.trace.sites), test.targets)
    for number, checkpoint in enumerate(checkpoints, start=1):
        description = f"Test gradients {number}/{len(checkpoints)}{block_name}"
        try:
            run_pass(query, checkpoint, Pass(loader, step, test.take, description))
        except OtherExamples as error:
            raise ValueError(_of_random(error, loader)) from error
        with query.processes.synchronized():
            test.finish_checkpoint(checkpoint, query.processes)
    return test


def _of_random(error: OtherExamples, loader: Any) -> str:
    """What to say of test examples that come otherwise each time."""
    collate = getattr(loader, "collate_fn", loader)  # a loader of the user's own kind may have none
    own = getattr(collate, "own", collate)  # of raw examples
    name = getattr(own, "__qualname__", type(own).__name__)
    return (
        f"{error}: the collate function of the test loader, {name}, or its data set draws at random, and each pass "
        "gets other draws. Draw once, and keep what is drawn in the data set, or seed a generator by the example."
    )


def _nothing_taken(*_: Any) -> None:
    """What the model says is remembered by the step itself."""


def _blocks(query: Query, checkpoints: Sequence[Checkpoint], asked: Sequence[AskedExamples]) -> list[tuple[int, Any]]:
    """Loaders over so many test examples each that their gradients, at all checkpoints, fit into memory.

    With each goes the number of the loader whose examples they are.
    """
    sites = sites_of(query.method, query.trace.sites)
    with query.processes.synchronized():
        stored = sum(checkpoint.gradients(site).nbytes for checkpoint in checkpoints for site in sites)
        whole = 4 / DTYPES[query.trace.dtype].itemsize  # test gradients are kept in float32
        per_example = whole * stored / query.trace.n_train
        whole_loader = query.trainer.limit_predict_batches == 1.0
        together = len(asked) if lacks_scales(query.method) else 1  # a block of each, to measure what divides a sum
        n_examples = max(1, int(_BLOCK_BYTES / together / max(per_example, 1.0))) if whole_loader else None
        longest = query.trace.longest_text if any(each.raw is not None for each in asked) else None
        ready = [each.ready(longest) for each in asked]
        blocks = [example_blocks(loader, n_examples, query.processes) for loader in ready]
        return [(owner, block) for owner, of_loader in enumerate(blocks) for block in of_loader]


def _first_blocks(loaders: Sequence[tuple[int, Any]]) -> list[int]:
    """The number of each loader's first block."""
    owners = [owner for owner, _ in loaders]
    return [owners.index(owner) for owner in dict.fromkeys(owners)]
