"""Whether a target fits what a module says, and whether other labels reach its loss: told on a first batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.bridge.mixin import with_labels_of
from lightning_tracin.bridge.observing import Observer
from lightning_tracin.bridge.target_names import TargetNames
from lightning_tracin.gradients.losses import elementwise_losses
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.outputs import Output
from lightning_tracin.gradients.targets import Target

_TASKS = {
    "class": "classification",
    "binary": "classification",
    "value": "regression",
    "set": "multi-label classification",
    "tokens": "classification of tokens",
    "answer": "question answering",
}


def require_fitting(target: Target, classes: Sequence[int], output: Output, names: TargetNames) -> None:
    """Check that a module says what a target is about.

    Args:
        target: what was asked for.
        classes: the numbers of its classes.
        output: what the module says.
        names: of its classes.

    Raises:
        ValueError: if it does not; the message says what fits.
    """
    kind, asked, task = output.kind, f"target={str(target)!r}", _TASKS[output.kind]
    if target.has_positions and kind != "tokens":
        raise ValueError(f"positions goes with labels of tokens, but this model does {task}.")
    if kind == "value" and output.n_classes > 1 and target.what == "prediction":
        raise ValueError(f"{asked}: the model says {output.n_classes} values; name one of them by its number.")
    if not classes:
        return
    if kind == "answer" or (kind == "value" and output.n_classes == 1):
        which = "answer" if kind == "answer" else "value"
        hint = "" if kind == "answer" else " A single output is of two classes where influence_labels tells 0 and 1."
        raise ValueError(
            f'{asked} is a class, but this model does {task}: "prediction" is the {which} that it gives.{hint}'
        )
    if len(set(classes)) < len(classes):
        raise ValueError(f"{asked} holds class {classes[0]} against itself: name two classes.")
    if names.of_vocabulary and not target.has_positions:
        raise ValueError(f"{asked} is a token: say by positions at which places of the text.")


def require_told(target: Target, classes: Sequence[int], output: Output, observer: Observer) -> None:
    """Check that a module's outputs tell what a target needs to know of them.

    Args:
        target: what was asked for.
        classes: the numbers of its classes.
        output: what the module says, as its losses tell, too.
        observer: of the module.

    Raises:
        ValueError: if they do not, or if there is no such class.
    """
    if target.what == "prediction" and not output.is_told:
        raise ValueError(f"{_untold(observer, output)} Nor does a class, by its number or name.")
    n_classes = output.n_classes if output.is_told else observer.n_classes_trained
    if classes and n_classes is not None and max(classes) >= n_classes:
        of = "The model has" if output.is_told else "Training's labels are of"
        raise ValueError(
            f"target={str(target)!r}: there is no class {max(classes)}. {of} {n_classes}, numbered from 0."
        )


def require_labels_are_read(observer: Observer, output: Output, batch: Any, labels: tuple[Tensor, Tensor]) -> Output:
    """Check that labels reach the loss where they are put, and change nothing that the model reads.

    Args:
        observer: of the module.
        output: what it says, as far as its form tells.
        batch: its first.
        labels: two kinds of labels for the batch, by which each example has another one.

    Returns:
        What it says, as its losses tell too.

    Raises:
        ValueError: if labels do not reach the loss, or change what is said, or if losses of sets or of tokens are not
            the usual ones of what seems to be said.
    """
    name = type(observer.module).__name__
    (losses, said), (others, said_again) = (observer.losses_with(batch, each) for each in labels)
    if not bool((said != said.flatten()[0]).any()):
        return output  # a head of zeros says the same of all labels
    if torch.equal(losses, others):
        raise ValueError(
            f"The losses of {name} are the same whatever labels influence_with_labels puts into the batch. Override "
            "influence_with_labels(batch, labels) to put them where influence_loss reads them."
        )
    if not torch.allclose(said, said_again, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"What {name} says depends on the labels in its batch, which its forward reads. Let influence_with_labels "
            "keep what the model reads, such as decoder_input_ids, and let forward take it."
        )
    if output.kind == "class":
        alternating = torch.arange(len(losses), device=labels[0].device).reshape(-1, *[1] * (labels[0].dim() - 1)) % 2
        alternating = alternating.expand_as(labels[0]).to(labels[0])
        changed = with_labels_of(observer.module, batch, alternating)
        return replace(output, is_told=observer.tell_classes(changed, alternating))
    if output.kind not in ("set", "tokens"):
        return output
    for causal in (output.causal, not output.causal) if output.kind == "tokens" else (False,):
        if _are_usual(observer, others, said.float(), labels[1], causal=causal):
            return replace(output, causal=causal)
    raise ValueError(_untold(observer, output))


def _untold(observer: Observer, output: Output) -> str:
    return (
        f"What {type(observer.module).__name__} says cannot be told from its outputs, as its losses are not those that "
        f'are usual in {_TASKS[output.kind]}. target="label" does not need it.'
    )


def _are_usual(observer: Observer, losses: Tensor, logits: Tensor, labels: Tensor, *, causal: bool) -> bool:
    """Whether losses are the usual ones of logits and labels: means over an example, or sums, times a constant."""
    labels = labels.float() if labels.shape == logits.shape else labels
    values, counted = elementwise_losses(logits, labels, problem_type=None, causal=causal)
    sums = values.flatten(1).sum(1)
    means = sums / counted.flatten(1).sum(1).clamp(min=1)
    losses = losses.to(sums)
    if isinstance(observer.losses, MeanLoss):  # each is the mean of its batch
        return any(torch.allclose(losses[0], usual.mean(), rtol=2e-2) for usual in (means, sums))
    ratios = [losses / usual for usual in (means, sums)]
    return any(bool(each[0] > 0) and torch.allclose(each, each[:1].expand_as(each), rtol=2e-2) for each in ratios)
