"""What a model says of a batch: what its numbers mean, and the labels that they amount to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tracin.gradients.attention_masks import attended_tokens
from lightning_tracin.gradients.batches import IGNORED
from lightning_tracin.gradients.losses import is_causal

#: What an output means: one of several classes, one of two by a single number, numbers, a set of classes, a class or
#: token at each position, or where an answer starts and ends.
Kind: TypeAlias = Literal["class", "binary", "value", "set", "tokens", "answer"]

# Sums of gradients that round to 0 in 8 bits, as a share of the gradients' squares, and the shares of these that lie in
# the direction of a loss: near it, as with smoothed labels, and there.
_ADDS_UP, _NEAR, _THERE = 1e-3, 0.5, 0.9

# The losses of regressions.
_DISTANCES = (functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss)


@dataclass(frozen=True)
class Output:
    """What a model says of a batch of B examples.

    Attributes:
        kind: what it means.
        logits: (B, C), one for each class or value; (B, T, C) of tokens; (B, 2, T) of answers.
        causal: whether the logits at a position are of the token after it.
        is_told: whether the logits are known to be those of the classes; if not, the losses of labels say them alone.
    """

    kind: Kind
    logits: Tensor
    causal: bool = False
    is_told: bool = True

    @property
    def n_classes(self) -> int:
        """The number of classes, or of tokens in the vocabulary."""
        return 2 if self.kind == "binary" else self.logits.shape[-1]

    def said(self) -> Tensor:
        """The labels that the model says, on the CPU: (B,), (B, C) of sets, (B, T) of tokens, (B, 2) of answers.

        Raises:
            ValueError: if it says values, which are no labels.
        """
        logits = self.logits.detach()
        if self.kind == "value":
            raise ValueError("Values are no labels.")
        if self.kind == "answer":
            return torch.stack(best_answers(*logits.cpu().double().unbind(1))[:2], 1)
        if self.kind == "binary":
            return (logits[:, 0] > 0).long().cpu()
        if self.kind == "set":
            return (logits > 0).float().cpu()
        best = logits.argmax(-1).cpu()  # before they are moved: a vocabulary is large
        return best.roll(1, 1) if self.causal else best

    @property
    def without_examples(self) -> Output:
        """The same of no examples: what it means, and of how many classes."""
        return replace(self, logits=self.logits.detach()[:0].clone())

    def log_of_output(self, number: int) -> Tensor:
        """(B,) one of several outputs that do not exclude each other: a value, or log p of a class of a set."""
        logits = self.logits[:, number].float()
        return functional.logsigmoid(logits) if self.kind == "set" else logits


def output_of(
    logits: Tensor, labels: Tensor | None, model: nn.Module | None, *, own_loss: bool, may_be_binary: bool
) -> Output:
    """What logits mean, by the labels of their batch and by a model of transformers.

    Args:
        logits: (B,), (B, C) or (B, T, C).
        labels: the batch's; None if it has none.
        model: the model of transformers that they come from, if they do.
        own_loss: whether the module says itself what its loss is, so that the model's configuration does not.
        may_be_binary: whether a single output may stand for two classes, as far as more than this batch tells; labels
            of its own that are no classes speak against it.
    """
    if logits.dim() == 3:
        return Output("tokens", logits, causal=is_causal(model))
    logits = logits.reshape(len(logits), -1)
    configured = getattr(getattr(model, "config", None), "problem_type", None)
    if logits.shape[1] == 1:
        told = may_be_binary and (labels is None or are_of_two_classes(labels))
        is_binary = told if model is None or own_loss else configured == "multi_label_classification"
        return Output("binary" if is_binary else "value", logits)
    if configured == "regression":
        return Output("value", logits)
    is_set = labels is not None and labels.shape == logits.shape
    if labels is not None and not is_set and not are_whole(labels):
        return Output("value", logits)
    return Output("set" if is_set or configured == "multi_label_classification" else "class", logits)


def are_of_two_classes(labels: Tensor) -> bool:
    """Whether labels, one for each example, are 0 and 1, of whatever type. NaN and whole numbers below 0 are none.

    Example:
        >>> [are_of_two_classes(torch.tensor(each)) for each in ([[1.0], [0.0]], [1, -1], [0.5, 1.0], [0, 2])]
        [True, True, False, False]
    """
    values = labels.detach().cpu().double()
    has_none = values.isnan() | are_none(values)
    return values.numel() == len(values) and bool((has_none | (values == 0) | (values == 1)).all())


def are_whole(labels: Tensor) -> bool:
    """Whether labels, as far as there are any, are whole numbers, of whatever type, as those of classes are."""
    values = labels.detach().cpu().double()
    return not bool((values.isfinite() & (values.frac() != 0)).any())


def are_none(labels: Tensor) -> Tensor:
    """Which labels, float64, are no class: data sets write whole numbers below 0 there, of any type."""
    return (labels < 0) & (labels.frac() == 0)


def are_distances(losses: Tensor, outputs: Tensor, labels: Tensor) -> bool:
    """Whether losses are those of a regression: squared or absolute differences, of which labels may be 0 and 1, too.

    Cross-entropies of two classes, which at some outputs are as large, are none.

    Args:
        losses: (B,), or the mean of the batch, B times.
        outputs: (B,) or (B, 1) what the model says.
        labels: (B,) or (B, 1).

    Example:
        >>> outputs, labels = torch.tensor([0.2, 0.9]), torch.tensor([0.0, 1.0])
        >>> are_distances((outputs - labels) ** 2, outputs, labels)
        True
        >>> are_distances(torch.tensor([0.7981, 0.3412]), outputs, labels)  # cross-entropies
        False
    """
    said, wanted = outputs.detach().cpu().float().reshape(-1), labels.detach().cpu().float().reshape(-1)
    found = losses.detach().cpu().float()
    tolerance = 1e-3 if outputs.element_size() > 2 else 2e-2

    def have(values: Tensor) -> bool:
        same = (torch.allclose(found, each.expand_as(found), rtol=tolerance) for each in (values, values.mean()))
        return any(same)

    if len(said) != len(wanted) or have(functional.binary_cross_entropy_with_logits(said, wanted, reduction="none")):
        return False
    distances = [each(said, wanted, reduction="none") for each in _DISTANCES]
    return any(have(factor * values) for values in distances for factor in (1, 0.5))


def tell_classes(logits: Tensor, gradients: Tensor, labels: Tensor) -> bool | None:
    """Whether the gradients of losses at logits are those of classes, which each label's own logit lowers.

    The gradient of a cross-entropy is a multiple of the probabilities less 1 at the label, which adds up to 0; weights
    of classes, smoothed labels and focal losses leave it near that direction. That of one binary cross-entropy, or
    squared error, for each class is a multiple of what it says less 1 at the label. What a loss does with other
    outputs, such as a projection, thresholds of ordered classes, or a mean and a variance, has other directions.

    Args:
        logits: (B, C).
        gradients: (B, C) of each example's loss, times any positive constant.
        labels: (B,) float64; NaN and negative ones are none.

    Returns:
        None if no label has a gradient, so that nothing is known.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1.0]).double()
        >>> tell_classes(logits, logits.softmax(1) - torch.tensor([0, 1, 0]), labels)
        True
        >>> tell_classes(logits, torch.tensor([[-0.12, 0.73, 0.5]]), labels)  # of thresholds: 1 less below the label
        False
    """
    counts = (labels >= 0) & gradients.isfinite().all(1) & logits.isfinite().all(1)
    logits, gradients, numbers = logits[counts].double(), gradients[counts].double(), labels[counts].long()
    total = float(gradients.square().sum())
    if not total:
        return None
    has_others = int(numbers.max()) >= logits.shape[1]  # labels that are shown may be counted otherwise than classes
    numbers = gradients.argmin(1) if has_others else numbers
    wanted = functional.one_hot(numbers, logits.shape[1])

    def explained(said: Tensor) -> float:
        """The share of the gradients' squares that lies in the directions of what is said less what is wanted."""
        directions = functional.normalize(said - wanted, dim=1)
        return float((gradients * directions).sum(1).clamp(min=0).square().sum()) / total

    adds_up = float(gradients.sum(1).square().sum()) <= _ADDS_UP * total
    if adds_up and explained(logits.softmax(1)) > _NEAR:
        return True
    return not has_others and max(explained(logits.sigmoid()), explained(logits)) > _THERE


def best_answers(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the likeliest answers start and end, and their log probabilities; none ends before it starts.

    Args:
        start: (B, T) logits of where an answer starts.
        end: (B, T) logits of where it ends.
    """
    best_start = start.log_softmax(1).cummax(1)  # for each end
    best = (best_start.values + end.log_softmax(1)).max(1)
    return best_start.indices.gather(1, best.indices[:, None])[:, 0], best.indices, best.values


def counted_tokens(labels: Tensor | None, batch: Any, shape: Sequence[int], *, causal: bool) -> Tensor:
    """(B, T) the positions of tokens that count: those with a label, or without labels all that are no padding.

    Args:
        labels: (B, T) those of the batch, if it has any.
        batch: its attention mask tells padding.
        shape: B and T.
        causal: whether each is predicted at the position before, so that a text's first token is not.
    """
    if labels is not None:
        counted = (labels != IGNORED).cpu()
    else:
        counted = attended_tokens(batch, shape)
        if causal:
            counted &= counted.cumsum(1) > 1
    if causal:
        counted[:, 0] = False
    return counted


def named_tokens(positions: Sequence[Sequence[int] | None], batch: Any, shape: Sequence[int]) -> Tensor:
    """(B, T) the tokens that positions name.

    Args:
        positions: for each example, from its first token on; None for all of them.
        batch: its attention mask tells where texts begin that are padded on the left.
        shape: B and T.
    """
    first = attended_tokens(batch, shape).long().argmax(1).tolist()
    named = torch.zeros(*shape, dtype=torch.bool)
    for row, places in enumerate(positions):
        if places is None:
            named[row] = True
        else:
            named[row, [place + first[row] for place in places if place + first[row] < shape[1]]] = True
    return named
