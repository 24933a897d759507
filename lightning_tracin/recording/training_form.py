"""How the gradients of training are made of those of the examples' losses, and the check that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tracin.bridge.mixin import losses_of
from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.gradients.capture import Captured, capture
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.layouts import Layout
from lightning_tracin.gradients.losses import label_counts
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.precision import full_precision, loss_tolerance

USE_CHECKPOINT = 'Use cache="checkpoint".'


@dataclass(frozen=True)
class TrainingForm:
    """How the gradients of training are made of those of the examples' losses.

    Attributes:
        layouts: for each layer, where the examples are in its calls.
        by_labels: whether the loss of a batch is the mean over all labelled tokens, rather than over the examples.
    """

    layouts: Mapping[nn.Module, Layout]
    by_labels: bool

    def layout_of(self, layer: nn.Module) -> Layout:
        """Where the examples are in a layer's calls: in the first dimension, if the first batch did not show it."""
        return self.layouts.get(layer, Layout())

    def shares(self, module: nn.Module, batch: Any, n_examples: int) -> Tensor:
        """What each example's loss counts in the loss of its batch, (n_examples,)."""
        counts = label_counts(module, batch) if self.by_labels else None
        if counts is None:
            return torch.full((n_examples,), 1 / n_examples, dtype=torch.float32)
        return counts.cpu().float().clamp(min=1) / max(1, int(counts.sum()))


@full_precision()
def check_training(gradients: ModuleGradients, batch: Any, of_losses: Captured) -> TrainingForm:
    """Check that the gradients of training are those of the examples' losses.

    Call it inside :func:`~lightning_tracin.gradients.eval_mode.gradients_enabled`.

    Args:
        gradients: takes those of the module that is about to be trained.
        batch: a batch of the training set, on the module's device.
        of_losses: what the losses of its examples gave.

    Raises:
        ValueError: if the loss of ``training_step`` is not a mean of the examples' losses, or if hooks do not run.
    """
    module = gradients.module
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
    if isinstance(losses_of(module), MeanLoss):
        return TrainingForm(gradients.layouts, by_labels=False)  # the mean is what it checks on its own
    found = _of_training(gradients, batch, of_losses)
    if isinstance(found, TrainingForm):
        return found
    raise ValueError(
        f"training_step of {name} does not return the mean of influence_loss over the batch, but gives {found} Is its "
        'loss weighted, a sum, or random? cache="training" cannot tell the examples\' gradients from it. '
        f"{USE_CHECKPOINT}"
    )


def _of_training(gradients: ModuleGradients, batch: Any, of_losses: Captured) -> TrainingForm | str:
    """How the gradients of training are made of those of the examples' losses; where they are not, how they differ."""
    module = gradients.module
    places = sites_on_module(module, gradients.sites)
    of_training = capture(MeanLoss(module, len(of_losses)), batch, places, layouts=dict(gradients.layouts))
    expected, found = (torch.stack(_norms(captured)) for captured in (of_losses, of_training))
    tolerance = loss_tolerance(module)
    for by_labels in (True, False):
        form = TrainingForm(gradients.layouts, by_labels)
        weighted = expected * form.shares(module, batch, len(of_losses)) * len(of_losses)
        if torch.allclose(found, weighted, rtol=tolerance, atol=float(weighted.max()) * tolerance):
            return form
    worst = int((found - expected).abs().amax(0).argmax())
    return (
        f"the gradient of the batch's example {worst} the norm {float(found[0, worst]):.4g} by the one and "
        f"{float(expected[0, worst]):.4g} by the other."
    )


def warn_of_another_loss(gradients: ModuleGradients, batch: Any, of_losses: Captured) -> None:
    """Warn if ``training_step`` trains another loss than the mean of ``influence_loss``, of which scores are.

    Losses and gradients are compared: where a model says the same of all classes, as before training, label smoothing
    hardly changes a loss. Nothing is said where that cannot be told: where ``training_step`` cannot be called by itself
    or is the only loss that is known, and where a loss is drawn at random.

    Args:
        gradients: takes those of the module that is about to be trained, in eval mode.
        batch: a batch of the training set, on the module's device.
        of_losses: what the losses of its examples gave.
    """
    module = gradients.module
    losses = losses_of(module)
    if isinstance(losses, MeanLoss):
        return
    tolerance = loss_tolerance(module)
    of_training = MeanLoss(module, len(of_losses))
    try:
        with torch.no_grad():
            trained, trained_again = (float(of_training(batch)[0]) for _ in range(2))
        form = _of_training(gradients, batch, of_losses)
    except Exception:  # of any kind: it may need what only training sets up
        return
    with torch.no_grad():
        repeated = losses(batch).detach().float().cpu()
    is_random = not torch.allclose(repeated, of_losses.losses, rtol=tolerance, atol=1e-6)
    if is_random or not isclose(trained, trained_again, rel_tol=tolerance):  # NaN is close to nothing
        return
    shares = [TrainingForm({}, by_labels).shares(module, batch, len(of_losses)) for by_labels in (False, True)]
    means = [float((of_losses.losses * share).sum()) for share in shares]
    found = f"returned a loss of {trained:.6g}, but the mean of influence_loss is {means[0]:.6g}"
    if any(isclose(trained, mean, rel_tol=tolerance, abs_tol=1e-7) for mean in means):
        if isinstance(form, TrainingForm):
            return
        found = f"and influence_loss give {form[:-1]}"
    rank_zero_warn(
        f"On {len(of_losses)} training examples, training_step of {type(module).__name__} {found}: what is trained is "
        "another loss (class weights? label smoothing? a further term?). Scores are of influence_loss. Let "
        "influence_loss(batch) return, for each example, the loss that is trained; or ignore this where the difference "
        "is meant."
    )


def _norms(captured: Captured) -> list[Tensor]:
    """The norms of the examples' gradients at each layer."""
    return [block.example_norms() for block in captured.gradients.values()]


def divisor_of(accumulated: int, scaler: Any) -> tuple[float, bool]:
    """What Lightning and an fp16 loss scaler together divide a mean loss by, and whether there is a scaler."""
    scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None
    return accumulated / (scale or 1.0), scale is not None
