"""How the gradients of training are made of those of the examples' losses, and the check that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tracin.bridge.mixin import losses_of
from lightning_tracin.gradients.capture import Captured, capture, find_example_dims
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.losses import label_counts
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.precision import full_precision, uses_half_precision
from lightning_tracin.gradients.sites import Site

USE_CHECKPOINT = 'Use cache="checkpoint".'


@dataclass(frozen=True)
class TrainingForm:
    """How the gradients of training are made of those of the examples' losses.

    Attributes:
        dims: for each layer, the dimension of its calls that counts the examples.
        by_labels: whether the loss of a batch is the mean over all labelled tokens, rather than over the examples.
    """

    dims: Mapping[nn.Module, int]
    by_labels: bool

    def shares(self, module: nn.Module, batch: Any, n_examples: int) -> Tensor:
        """What each example's loss counts in the loss of its batch, (n_examples,)."""
        counts = label_counts(module, batch) if self.by_labels else None
        if counts is None:
            return torch.full((n_examples,), 1 / n_examples, dtype=torch.float32)
        return counts.cpu().float().clamp(min=1) / max(1, int(counts.sum()))


@full_precision()
def check_training(module: nn.Module, sites: Sequence[Site], batch: Any, of_losses: Captured) -> TrainingForm:
    """Check that the gradients of training are those of the examples' losses.

    Call it inside :func:`~lightning_tracin.gradients.eval_mode.gradients_enabled`.

    Args:
        module: the module that is about to be trained.
        sites: where gradients are needed.
        batch: a first batch of the training set, on the module's device.
        of_losses: what the losses of its examples gave.

    Raises:
        ValueError: if the loss of ``training_step`` is not a mean of the examples' losses, or if hooks do not run.
    """
    name = type(module).__name__
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f'cache="training" needs automatic optimization, but {name} optimizes manually. {USE_CHECKPOINT}'
        )
    compiled = any(type(part).__name__ == "OptimizedModule" for part in module.modules())
    if compiled or getattr(module, "_compiler_ctx", None):
        raise ValueError(f'cache="training" cannot see into a compiled module, as {name} is. {USE_CHECKPOINT}')
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        rank_zero_warn(
            f'{name} has batch norm, which in training mixes the examples of a batch: what cache="training" stores for '
            'an example is then partly of its neighbours. cache="checkpoint" is free of that.'
        )
    places = sites_on_module(module, sites)
    losses = losses_of(module)
    dims = find_example_dims(losses, batch, [layer for each in places for layer in each.layers], independent=False)
    if isinstance(losses, MeanLoss):
        return TrainingForm(dims, by_labels=False)  # the mean is what it checks on its own
    of_training = capture(MeanLoss(module), batch, places, dims=dims)
    expected, found = (torch.stack(_norms(captured)) for captured in (of_losses, of_training))
    tolerance = 5e-2 if uses_half_precision(module) else 1e-3
    for by_labels in (True, False):
        form = TrainingForm(dims, by_labels)
        weighted = expected * form.shares(module, batch, len(of_losses)) * len(of_losses)
        if torch.allclose(found, weighted, rtol=tolerance, atol=float(weighted.max()) * tolerance):
            return form
    worst = int((found - expected).abs().amax(0).argmax())
    raise ValueError(
        f"training_step of {name} does not return the mean of influence_loss over the batch: the gradient of the first "
        f"batch's example {worst} has the norm {float(found[0, worst]):.4g} by the one and "
        f"{float(expected[0, worst]):.4g} by the other. Is its loss weighted, a sum, or random? "
        f'cache="training" cannot tell the examples\' gradients from it. {USE_CHECKPOINT}'
    )


def _norms(captured: Captured) -> list[Tensor]:
    """The norms of the examples' gradients at each layer."""
    return [block.example_norms() for block in captured.gradients.values()]


def divisor_of(accumulated: int, scaler: Any) -> tuple[float, bool]:
    """What Lightning and an fp16 loss scaler together divide a mean loss by, and whether there is a scaler."""
    scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None
    return accumulated / (scale or 1.0), scale is not None
