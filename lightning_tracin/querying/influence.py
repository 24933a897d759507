"""``influence`` and ``self_influence``: what a Trainer is asked after a fit, in this process or in another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.bridge.queries import Queries, result_of, weights_kept
from lightning_tracin.bridge.query_examples import example_blocks
from lightning_tracin.bridge.strategy import launched, require_results
from lightning_tracin.gradients.rows import DTYPES
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.querying.asked import (
    attached_datamodule,
    datamodule_asked,
    given_module,
    module_asked,
    spread_weights,
    trace_asked,
    usable_module,
)
from lightning_tracin.querying.asked_examples import AskedExamples, examples_asked, told_by_loader
from lightning_tracin.querying.filling import ready_checkpoints
from lightning_tracin.querying.passes import Pass, Query, run_pass
from lightning_tracin.querying.undisturbed import left_as_found, require_idle
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of
from lightning_tracin.scoring.score import self_influences
from lightning_tracin.scoring.strongest import clipped_k
from lightning_tracin.scoring.terms import sites_of
from lightning_tracin.storage.checkpoint import Checkpoint
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
) -> InfluenceResult:
    """Score every training example's influence on every test example.

    Works with the trainers of ``pytorch_lightning`` and ``lightning.pytorch``. The model's weights, the random number
    generators and the trainer's metrics are afterwards as they were.

    Args:
        trainer: runs the test examples through the model, on its own device and precision.
        dataloaders: the test examples: a loader of batches that ``training_step`` takes, or several in a list or a
            mapping; a datamodule; or texts, rows, a data set, which are tokenised and collated as in training. By
            default those of ``datamodule``, or of the fit's own.
        model: the trained module; by default that of the last fit in this process.
        datamodule: gives ``test_dataloader`` and ``train_dataloader`` where loaders are not passed.
        train_dataloaders: one loader of the training set of the fit. It is needed only where gradients are not
            stored yet (``cache="on_demand"``); by default that of the last fit in this process. Or a datamodule.
        trace: what the fit recorded, or its folder; by default that of the last fit in this process.
        method: "tracin-we", "tracin-last", or a :class:`TracInWE`, :class:`TracInLast`, :class:`TracInLayer` or
            :class:`TracInSum` with options.
        k: keep only the k strongest proponents and opponents of each test example. Memory then does not grow with
            the training set.

    Returns:
        Scores, one row for each test example in the order of the test data set; of several, one after the other.

    Raises:
        TypeError: if one of them is not of its kind.
        ValueError: if the model or the training set is not that of the trace, if a loader is empty, if it is not known
            how to make batches of test examples, if gradients are not finite, if there is nothing to score from, or if
            the trainer is in the middle of a fit. The message says what to do.
        BlockingIOError: if gradients are missing, and a fit or another query is writing into the trace.
    """
    chosen = method_of(method)
    require_idle(trainer)
    require_results(trainer)
    datamodule, dataloaders, train_dataloaders = datamodule_asked(datamodule, dataloaders, train_dataloaders)
    with left_as_found(trainer):
        processes = launched(trainer)
        with processes.synchronized():
            module = module_asked(trainer, model)
            opened = trace_asked(trainer, trace)
            n_kept = None if k is None else clipped_k(k, opened.n_train - len(opened.undrawn))
            hooks = datamodule or attached_datamodule(trainer, module)
            query = Query(trainer, module, opened, chosen, hooks, processes)
            asked = examples_asked(query, dataloaders, train_dataloaders)
        spread_weights(trainer, module, asked[0].loader, datamodule)
        scratch = Scratch()
        answered: list[Queries] = []
        gradients: list[list[WordGradients]] = []
        owners: list[int] = []  # of each test example, the number of its loader
        with weights_kept(module):
            checkpoints = ready_checkpoints(query, module, datamodule, train_dataloaders)
            loaders = _blocks(query, checkpoints, asked)
            for number, (owner, loader) in enumerate(loaders, start=1):
                block_name = f", block {number}/{len(loaders)}" if len(loaders) > 1 else ""
                block = _answered(query, checkpoints, loader, n_kept, block_name)
                words = block.word_gradients()
                gradients.append([scratch.put(each) for each in words] if len(loaders) > 1 else words)
                block.drop_gradients()
                answered.append(block)
                owners += [owner] * len(block.indices)
        return told_by_loader(result_of(answered, gradients, scratch), asked, owners)


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
    require_idle(trainer)
    datamodule, _, train_dataloaders = datamodule_asked(datamodule, None, train_dataloaders)
    with left_as_found(trainer):
        processes = launched(trainer)
        module = given_module(model) or trainer.lightning_module
        with processes.synchronized():
            opened = trace_asked(trainer, trace)
            module = None if module is None else usable_module(trainer, module)
        if module is not None:
            spread_weights(trainer, module, [], datamodule)
        hooks = datamodule or (None if module is None else attached_datamodule(trainer, module))
        query = Query(trainer, module, opened, chosen, hooks, processes)
        with weights_kept(module) if module is not None else nullcontext():
            checkpoints = ready_checkpoints(query, module, datamodule, train_dataloaders)
        with processes.synchronized():
            return self_influences(checkpoints, chosen, processes)


def _answered(query: Query, checkpoints: Sequence[Checkpoint], loader: Any, k: int | None, block_name: str) -> Queries:
    """A block of test examples, scored; its name follows the checkpoint's number in the progress bar."""
    test = Queries(query.module, query.method, query.trace)
    sites = sites_of(query.method, query.trace.sites)
    gradients = ModuleGradients(query.module, sites, recorded=query.trace.sites, probe=test.probe)
    for number, checkpoint in enumerate(checkpoints, start=1):
        description = f"Test gradients {number}/{len(checkpoints)}{block_name}"
        run_pass(query, checkpoint, Pass(loader, gradients, test.take, description))
        with query.processes.synchronized():
            test.finish_checkpoint(checkpoint, query.processes)
    with query.processes.synchronized():
        test.score(k, query.processes, query.trainer.strategy.root_device)
    return test


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
        n_examples = max(1, int(_BLOCK_BYTES / max(per_example, 1.0))) if whole_loader else None
        longest = query.trace.longest_text if any(each.raw is not None for each in asked) else None
        ready = [each.ready(longest) for each in asked]
        blocks = [example_blocks(loader, n_examples, query.processes) for loader in ready]
        return [(owner, block) for owner, of_loader in enumerate(blocks) for block in of_loader]
