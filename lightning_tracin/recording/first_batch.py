"""Finding the sites on a first batch, and checking there that influence can be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_tracin.bridge.compat import batch_to_device
from lightning_tracin.bridge.extents import rows_of_all
from lightning_tracin.bridge.loaders import batches_over
from lightning_tracin.bridge.looks import differing
from lightning_tracin.bridge.mixin import embedding_layer_of, last_layer_of, losses_of
from lightning_tracin.bridge.module_gradients import ModuleGradients, inside_fit
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.gradients.batches import rows_of
from lightning_tracin.gradients.batching_check import check_batching
from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.eval_mode import zero_weights_filled
from lightning_tracin.gradients.layers import NoLastLayer, called_layers, layer_name, linear_layers_named, named_layer
from lightning_tracin.gradients.linear_layers import has_bias
from lightning_tracin.gradients.losses import (
    NOT_FINITE_ADVICE,
    DependsOnBatch,
    Losses,
    checked_losses,
    require_one_each,
)
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import is_fsdp
from lightning_tracin.recording.plan import LAST, WORDS
from lightning_tracin.recording.training_form import warn_of_another_loss
from lightning_tracin.storage.encoding import StorageOptions, size_of_captured
from lightning_tracin.storage.sizes import LayerSize


@dataclass(frozen=True)
class FirstBatch:
    """What a first batch told.

    Attributes:
        batch: on the module's device.
        captured: its gradients.
        gradients: took them, and knows the layers now.
    """

    batch: Any
    captured: Captured
    gradients: ModuleGradients


@full_precision()  # so that what is compared differs by no rounding
def look_at_first_batch(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    training_set: TrainingSet,
    methods: Sequence[str],
    *,
    compared: bool = False,
    at: str = "before training began",
) -> FirstBatch:
    """Find the sites, and check on the training set's first batch that influence can be computed.

    Under FSDP one backward pass of its own tells the layers' dimensions, for all batches.

    Args:
        trainer: whose fit is about to begin.
        module: the module in training.
        training_set: the examples.
        methods: what sites are asked for.
        compared: whether to warn if training trains another loss, which nothing else would notice; not under FSDP.
        at: which weights the module has, for the message.

    Raises:
        ValueError: if it cannot; the message says why, and what to do.
    """
    losses = losses_of(module)
    with inside_fit(trainer, module), zero_weights_filled(module):
        first_batches = training_set.first_batches()
        batch = batch_to_device(trainer, module, next(first_batches))
        gradients = ModuleGradients(module, _sites(module, losses, batch, methods))
        gradients.check_mean(batch)
        if is_fsdp(module):
            gradients.learn_layouts(batch)
        captured = gradients.capture(batch)
        if training_set.first_size is not None:
            require_one_each(len(captured), training_set.first_size, "training")
        bad = captured.first_not_finite()
        if bad is not None:
            raise ValueError(
                f"The {captured.fault(bad)} of training example {training_set.first_indices[bad]} is NaN or infinite "
                f"{at}. {NOT_FINITE_ADVICE}"
            )
        _warn_of_words_without_gradients(captured)
        if not is_fsdp(module):  # a pass without gradients is too many for FSDP
            others = (batch_to_device(trainer, module, each) for each in first_batches)
            _check_batching(trainer, module, training_set, batch, captured, others)
        if compared and not is_fsdp(module):
            warn_of_another_loss(gradients, batch, captured)
    return FirstBatch(batch, captured, gradients)


def _warn_of_words_without_gradients(captured: Captured) -> None:
    """Warn if no word of any example has a gradient: TracIn-WE would say that nothing has any influence."""
    words = captured.gradients.get("words")
    if words is not None and not len(words.examples):
        rank_zero_warn(
            "The gradients of all words of the first training examples are zero: the loss is detached from the word "
            "embedding layer, or the weights behind it are zero as yet. As long as that is so, all scores by "
            '"tracin-we" are zero; methods=("tracin-last",) in TracInCallback records the last layer alone.'
        )


def layer_sizes(first: FirstBatch, training_set: TrainingSet) -> dict[str, LayerSize]:
    """How large the gradients of training examples are at each site, by its key, as a first batch tells."""
    captured = {key: size_of_captured(block) for key, block in first.captured.gradients.items()}
    return {key: replace(size, rows=_rows_of_all(size.rows, training_set)) for key, size in captured.items()}


def text_lengths(first: FirstBatch, training_set: TrainingSet) -> Sequence[float]:
    """How many tokens some training examples have, as a first batch tells."""
    return _rows_of_all(first.captured.texts(None).rows_by_example().tolist(), training_set)


def _rows_of_all(rows: Sequence[float], training_set: TrainingSet) -> Sequence[float]:
    """What a first batch has of each example, as estimates for examples from all over the training set."""
    first, others = training_set.extents()
    if not first or not others:
        return rows
    return rows_of_all([rows[place] for place in first], list(first.values()), others)


def stored_sites(first: FirstBatch, options: StorageOptions, sizes: Mapping[str, LayerSize]) -> tuple[Site, ...]:
    """The sites, each storing what options ask for.

    Args:
        first: what a first batch told.
        options: the options.
        sizes: of the gradients at each site, by its key.

    Raises:
        ValueError: if a projection is of no site, or saves nothing.
    """
    sites = first.gradients.sites
    asked = options.projection
    if asked is not None and not any(site.has_words is isinstance(asked, int) for site in sites):
        what = "word gradients (a number)" if isinstance(asked, int) else "linear layers (a pair of numbers)"
        raise ValueError(f"projection={asked} is for {what}, but methods={tuple(site.name for site in sites)}.")
    if options.rank is not None and all(site.has_words for site in sites):
        raise ValueError(f"rank={options.rank} is for linear layers, but methods={tuple(site.name for site in sites)}.")
    return tuple(options.applied(site, sizes[site.key]) for site in sites)


def _check_batching(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    training_set: TrainingSet,
    batch: Any,
    captured: Captured,
    others: Iterator[Any],
) -> None:
    """Check that the losses of a first batch's examples do not depend on the others, or say that it cannot be told.

    Raises:
        DependsOnBatch: if they do.
        ValueError: if a half of the batch has not one loss for each example.
    """
    losses, size = losses_of(module), len(captured)
    if not training_set.iterable and size > 1:
        few = training_set.first_indices
        check_batching(module, losses, lambda _: next(others), few, batch, captured.losses)
        return
    try:
        if training_set.iterable:
            is_told = _is_stream_independent(module, losses, batch, captured)
        else:
            is_told = _are_two_independent(trainer, module, losses, training_set)
        why = "it holds one example"
    except DependsOnBatch:
        raise
    except Exception as error:  # from the collate function or the model, which may not be made for it
        is_told, why = False, f"{type(error).__name__}: {error}"
    if not is_told:
        rank_zero_info(
            "TracInCallback could not check on a first batch whether an example's loss depends on the others of its "
            f"batch ({why}). It must not: compute each from that example alone."
        )


def _is_stream_independent(module: pl.LightningModule, losses: Losses, batch: Any, captured: Captured) -> bool:
    """Whether a stream's first batch, cut into parts, could be checked."""
    size = len(captured)
    if size > 1 and not isinstance(losses, MeanLoss):  # whose own check does the same
        check_batching(module, losses, lambda part: rows_of(batch, part, size), range(size), batch, captured.losses)
    return size > 1 or isinstance(losses, MeanLoss)


def _are_two_independent(
    trainer: pl.Trainer, module: pl.LightningModule, losses: Losses, training_set: TrainingSet
) -> bool:
    """Whether two examples that training takes one by one could be checked together."""
    indices = differing(training_set.looked, 2)
    if len(indices) < 2:
        return False

    def collated(part: slice) -> Any:
        return batch_to_device(trainer, module, next(batches_over(training_set.loader, [indices[part]])))

    together = collated(slice(None))
    if isinstance(losses, MeanLoss):
        losses.check(together)
        return len(losses.rows(together)) == 2
    with torch.no_grad():
        expected = losses(together).float().cpu()
    check_batching(module, losses, collated, indices, together, expected)
    return True


def _sites(module: pl.LightningModule, losses: Losses, batch: Any, methods: Sequence[str]) -> list[Site]:
    """The sites that methods ask for: words first, then the last layer, then others in the order of the model."""
    sites: list[Site] = []

    def of_batch() -> Tensor:
        return checked_losses(losses(batch))

    if WORDS in methods:
        sites.append(Site("words", WORDS, layer_name(module, embedding_layer_of(module, of_batch, batch)), "words"))
    if LAST in methods:
        try:
            layer = layer_name(module, last_layer_of(module, of_batch))
        except NoLastLayer as error:
            if tuple(methods) != (WORDS, LAST):  # what is asked for by default is not asked for by the user
                raise
            rank_zero_info(f"TracInCallback records {WORDS} alone: {error}")
        else:
            sites.append(Site("linear-0", LAST, layer, "factors", is_last=True))
    for name in methods:
        if name not in (WORDS, LAST):
            sites += _layers_asked_for(module, of_batch, name, [site.layer for site in sites])
    return list(_numbered(module, sites))


def _layers_asked_for(
    module: pl.LightningModule, losses: Callable[[], Tensor], name: str, known: Sequence[str]
) -> list[Site]:
    """The sites of a layer's name, or of a pattern: of those that match it, the layers that take part in the loss."""
    names = linear_layers_named(module, name)
    if names != [name]:
        layers = [named_layer(module, each) for each in names]
        called = called_layers(losses, layers)
        names = [each for each, layer in zip(names, layers, strict=True) if layer in called]
        if not names:
            raise ValueError(f"No layer that methods={name!r} stands for is called when a loss is computed.")
    return [Site("linear-0", each, each, "factors") for each in names if each not in known]


def _numbered(module: nn.Module, sites: Sequence[Site]) -> Iterator[Site]:
    """Sites with keys of their own; those of linear layers tell of their biases."""
    number = 0
    for site in sites:
        if site.has_words:
            yield site
        else:
            yield replace(site, key=f"linear-{number}", has_bias=has_bias(named_layer(module, site.layer)))
            number += 1
