"""What a fit will cost: the size of its trace and the time of its passes, judged before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.gradients.sites import Site
from lightning_tracin.recording.expected import Expected, expected_of
from lightning_tracin.recording.expected_moments import moments_bytes
from lightning_tracin.recording.first_batch import FirstBatch, layer_sizes, text_lengths
from lightning_tracin.recording.plan import RecordingPlan
from lightning_tracin.storage.encoding import StorageOptions
from lightning_tracin.storage.recorded_checkpoint import frozen_names, tied_names
from lightning_tracin.storage.sizes import LABEL_BYTES, TOKEN_BYTES, LayerSize, TraceSize


@dataclass(frozen=True)
class Cost:
    """What a fit will write.

    Attributes:
        size: of its trace, when all gradients are stored.
        sites: where gradients are taken.
        layers: how large gradients are, by the sites' keys.
        moments: bytes of Adam's second moments, by the sites' keys.
        expected: what the fit will come to.
    """

    size: TraceSize
    sites: Sequence[Site]
    layers: Mapping[str, LayerSize]
    moments: Mapping[str, float]
    expected: Expected

    def sized(self, options: StorageOptions, sites: Sequence[Site]) -> TraceSize:
        """The size of the trace with other options, at some of the sites."""
        gradients = {site.name: options.nbytes(self.layers[site.key]) for site in sites}
        components = sum(options.components(self.layers[site.key]) for site in sites)
        moments = sum(self.moments[site.key] for site in sites)
        return replace(self.size, gradients=gradients, moments=moments, components=components)


def cost_of(
    trainer: pl.Trainer, plan: RecordingPlan, state: Mapping[str, Any], first: FirstBatch, training_set: TrainingSet
) -> Cost:
    """What a fit that is about to begin will write.

    Args:
        trainer: of the fit.
        plan: what is recorded.
        state: the module's state dict, with full weights.
        first: what a first batch told.
        training_set: the examples.
    """
    module, sites, n_train = first.gradients.module, first.gradients.sites, len(training_set)
    expected = expected_of(trainer, plan, training_set)
    layers = layer_sizes(first, training_set)
    frozen, tied = frozen_names(module), tied_names(state)
    sizes = {False: 0, True: 0}
    for name, value in state.items():
        if isinstance(value, Tensor) and name not in tied:
            sizes[name in frozen] += value.nbytes
    drawn = n_train * expected.drawn_in_the_middle
    blocks = first.captured.gradients
    moments = {
        site.key: moments_bytes(
            trainer.optimizers,
            module,
            state,
            site,
            blocks[site.key],
            n_drawn=drawn * fmean(layers[site.key].rows),
        )
        for site in sites
    }
    # A pass stores texts that no pass before it has read; training's own come anew.
    texts_each = plan.cache == "training" or (expected.epochs >= 1 and expected.drawn < 0.999 * expected.ever)
    share = expected.drawn if texts_each else expected.drawn_in_all
    size = TraceSize(
        weights=plan.keep_weights * sizes[False],
        frozen=plan.keep_weights * sizes[True],
        moments=sum(moments.values()),
        gradients={site.name: plan.options.nbytes(layers[site.key]) for site in sites},
        texts=n_train * share * (LABEL_BYTES + TOKEN_BYTES * fmean(text_lengths(first, training_set))),
        n_train=n_train,
        drawn=n_train * expected.drawn,
        checkpoints=expected.checkpoints,
        texts_each=texts_each,
        components=sum(plan.options.components(layers[site.key]) for site in sites),
    )
    return Cost(size, sites, layers, moments, expected)


def say_cost(plan: RecordingPlan, path: Path, cost: Cost, first: FirstBatch) -> None:
    """Say in one line what a fit will write, and how long its passes take."""
    size, (of_epoch, of_training) = cost.size, _time_of_pass(first)
    if plan.cache == "on_demand":
        stored = replace(size, gradients={}, texts=0, components=0)
        added = replace(size, weights=0, frozen=0, moments=0)
        rank_zero_info(
            f"TracInCallback: {stored} in {path}/; the first query adds {added}, by a pass over the training set at "
            f"each, which takes about {of_epoch}."
        )
        return
    if plan.cache == "training":
        passes = "gradients come from training's own backward passes"
    elif size.drawn < 0.999 * size.n_train:
        passes = f"a pass at each, over what was drawn since the last, takes about {of_training} training on it"
    else:
        passes = f"a pass over the training set at each takes about {of_epoch}"
    rank_zero_info(f"TracInCallback: {size} in {path}/; {passes}.")


def _time_of_pass(first: FirstBatch) -> tuple[str, str]:
    """How long a pass takes, against an epoch, and against training on the same examples.

    A rule: a forward pass takes about as long as a backward pass to the layers' outputs, as the gradients of all
    weights, and as an optimizer step with what else training does. A pass lacks the last two; that for the last layer
    alone also most of the backward pass. Where most weights are frozen, training lacks them too.
    """
    parameters = list(first.gradients.module.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    share = trained / max(1, sum(each.numel() for each in parameters))
    backward = 0 if all(site.is_last for site in first.gradients.sites) else 1
    ratio = (1 + backward) / (2 + 2 * share)
    if ratio < 0.3:
        return "a quarter of an epoch", "a quarter as long as"
    if ratio < 0.4:
        return "a third of an epoch", "a third as long as"
    return ("half an epoch", "half as long as") if ratio < 0.7 else ("an epoch", "as long as")
