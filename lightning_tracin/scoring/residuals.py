"""Residuals: how wrong the model still was about each training example at a checkpoint, from stored gradients.

The gradient of a cross-entropy at the logits is p - onehot(label). Its largest entry is that of the label, and is
1 - p(label), as the others are positive and add up to as much. So a trace that has the last layer's gradients as
factors knows it of every training example, without a forward pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.sites import Site, last_site
from lightning_tracin.storage.checkpoint import Checkpoint, drawn_at
from lightning_tracin.storage.shards import Shards


def residuals_at(checkpoint: Checkpoint) -> Tensor:
    """Each training example's residual at a checkpoint: the largest entry of its loss gradient at the model's output.

    With a cross-entropy, also a binary one of a single logit, it is 1 - p(label). Of several positions, such as tokens,
    it is the sum over them; a loss that is their mean has gradients divided by their number, so that it is the mean of
    1 - p(label) then. Of several labels, each with a cross-entropy of its own, it is the largest |p - y| of one,
    divided by their number if the loss is their mean; of a squared error it is 2 |prediction - y|.

    Args:
        checkpoint: has the training examples' gradients at the last layer. With ``cache="training"`` they are those of
            training, with dropout.

    Returns:
        (n_train,) float32; 0 for examples without a gradient: those that training did not draw, those whose gradient
        was not finite, and those with a loss that nothing makes smaller.

    Raises:
        FileNotFoundError: if gradients at the last layer are not stored yet.
        ValueError: if the fit did not record them, or not as factors, or if a file is damaged.
    """
    shards = checkpoint.gradients(residual_site(checkpoint.sites))
    residuals = torch.zeros(shards.n_examples)
    for shard in range(len(shards)):
        if shards.holds(shard):
            start, stop = shards.bounds(shard)
            residuals[start:stop] = _residuals_of(shards.read(shard))
    return residuals


def mean_residual_at(checkpoint: Checkpoint) -> float:
    """The mean residual of the training examples that count at a checkpoint: those drawn, with a finite gradient.

    Raises:
        FileNotFoundError: as :func:`residuals_at`.
        ValueError: as :func:`residuals_at`.
    """
    shards = checkpoint.gradients(residual_site(checkpoint.sites))
    counted = len(drawn_at(checkpoint)) - len(shards.not_finite)
    return _sum(shards.folder, shards.within, tuple(shards.checksums)) / counted if counted > 0 else 0.0


def residual_site(sites: Sequence[Site]) -> Site:
    """The site whose stored gradients tell residuals.

    Raises:
        ValueError: if there is none.
    """
    site = last_site(sites)
    if site is None:
        raise ValueError(
            'weights="residual" and TracInRidge need the gradients at the last linear layer, but the fit recorded '
            f'{tuple(each.name for each in sites)}. Fit again with "tracin-last" among the methods of TracInCallback, '
            'or use weights="equal", and residual=0 of TracInRidge.'
        )
    if site.shape != "factors":
        raise ValueError(
            f'weights="residual" and TracInRidge need the gradients at {site.layer!r} as factors, but the trace keeps '
            "them as one matrix for each example, because they are projected or have many positions. Fit without "
            'projection of linear layers if there is one, or use weights="equal", and residual=0 of TracInRidge.'
        )
    return site


@lru_cache(maxsize=1024)
def _sum(folder: Path, within: Path, _: Hashable) -> float:
    """The sum of all residuals in a folder of shards, read once for their checksums: each term of a score asks."""
    shards = Shards.open(folder, within=within)
    held = [shard for shard in range(len(shards)) if shards.holds(shard)]
    return sum(float(_residuals_of(shards.read(shard)).double().sum()) for shard in held)


def _residuals_of(block: FactorGradients) -> Tensor:
    """(n_examples,) float32, the residuals of a block of examples."""
    if block.deltas.numel() == 0:
        return torch.zeros(block.n_examples)
    largest = torch.maximum(block.deltas.amax(1), -block.deltas.amin(1)).float()
    return torch.zeros(block.n_examples).index_add_(0, block.examples, largest * block.delta_norms)
