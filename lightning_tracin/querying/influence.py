"""``influence`` and ``self_influence``: what a Trainer is asked after a fit, in this process or in another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_tracin.bridge.collated_order import check_order
from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.bridge.queries import Queries, result_of, weights_kept
from lightning_tracin.bridge.query_examples import example_blocks, only_test_loader
from lightning_tracin.bridge.strategy import launched, require_results
from lightning_tracin.bridge.unmoved import unmoved
from lightning_tracin.gradients.rows import DTYPES
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.querying.asked import (
    attached_datamodule,
    datamodule_asked,
    given_module,
    loader_of_datamodule,
    module_asked,
    spread_weights,
    trace_asked,
    usable_module,
)
from lightning_tracin.querying.filling import ready_checkpoints
from lightning_tracin.querying.passes import Pass, Query, run_pass
from lightning_tracin.querying.undisturbed import left_as_found, require_idle
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of
from lightning_tracin.scoring.score import self_influences
from lightning_tracin.scoring.strongest import clipped_k
from lightning_tracin.scoring.terms import sites_of
from lightning_tracin.storage.checkpoint import Checkpoint, require_weights
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
        dataloaders: one loader of test examples, in batches that ``training_step`` takes, or a datamodule.
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
        Scores, one row for each test example in the order of the test data set.

    Raises:
        ValueError: if the model or the training set is not that of the trace, if a loader is empty or there are
            several, if gradients are not finite, if there is nothing to score from (no checkpoint, or none with
            weights), or if the trainer is in the middle of a fit. The message says what to do.
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
            require_weights(opened.checkpoints)
            if dataloaders is None and datamodule is not None:
                dataloaders = loader_of_datamodule(trainer, datamodule, "test", processes)
            loader = only_test_loader(dataloaders)
            with unmoved(loader):
                check_order(loader, "test")
            n_kept = None if k is None else clipped_k(k, opened.n_train - len(opened.undrawn))
        spread_weights(trainer, module, loader, datamodule)
        query = Query(trainer, module, opened, chosen, datamodule or attached_datamodule(trainer, module), processes)
        scratch = Scratch()
        answered: list[Queries] = []
        gradients: list[list[WordGradients]] = []
        with weights_kept(module):
            checkpoints = ready_checkpoints(query, module, datamodule, train_dataloaders)
            loaders = _blocks(query, checkpoints, loader)
            for number, block_loader in enumerate(loaders, start=1):
                block_name = f", block {number}/{len(loaders)}" if len(loaders) > 1 else ""
                block = _answered(query, checkpoints, block_loader, n_kept, block_name)
                words = block.word_gradients()
                gradients.append([scratch.put(each) for each in words] if len(loaders) > 1 else words)
                block.drop_gradients()
                answered.append(block)
        return result_of(answered, gradients, scratch)


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


def _blocks(query: Query, checkpoints: Sequence[Checkpoint], loader: Any) -> list[Any]:
    """Loaders over so many test examples each that their gradients, at all checkpoints, fit into memory."""
    sites = sites_of(query.method, query.trace.sites)
    with query.processes.synchronized():
        stored = sum(checkpoint.gradients(site).nbytes for checkpoint in checkpoints for site in sites)
        whole = 4 / DTYPES[query.trace.dtype].itemsize  # test gradients are kept in float32
        per_example = whole * stored / query.trace.n_train
        whole_loader = query.trainer.limit_predict_batches == 1.0
        n_examples = max(1, int(_BLOCK_BYTES / max(per_example, 1.0))) if whole_loader else None
        return example_blocks(loader, n_examples, query.processes)
