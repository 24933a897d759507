"""What a model says of a batch: what its numbers mean, and the labels that they amount to."""

from __future__ import annotations

import math
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

# As shares of gradients' squares: sums that round to 0 in 8 bits; what the losses of classes may leave at all, and what
# cross-entropies at the label. And how much of a label is smoothed at most.
_ADDS_UP, _LEFT, _LEFT_OF_LABEL, _MOST_SMOOTHED = 1e-3, 0.02, 5e-3, 0.25
_EXACT, _ROUNDS, _FEW = 1e-3, 100, 3
# Powers of 1 - p in focal losses, and of p in the gradients of generalized cross-entropies (Zhang and Sabuncu 2018).
_FOCAL, _ROBUST = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0), (0.3, 0.5, 0.7, 1.0)

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


def tell_classes(logits: Tensor, gradients: Tensor, labels: Tensor, rounding: float = 0.0) -> bool | None:
    """Whether the gradients of losses at logits are those of classes, whose probabilities are what the logits say.

    The gradient of a cross-entropy is a multiple of the probabilities less 1 at the label. Weights of classes and focal
    losses multiply it, smoothed labels take the same of each class from it. That of a hinge loss is the same at each
    class that comes too near to the label's. That of one binary cross-entropy, or squared error, for each class is a
    multiple of what it says less 1 at the label. What a loss does with other outputs, such as a projection, logits to
    which something is added or by which something is multiplied, clusters of classes, thresholds of ordered classes, or
    a mean and a variance, is another.

    Args:
        logits: (B, C).
        gradients: (B, C) of each example's loss, times one positive constant.
        labels: (B,) float64; NaN and negative ones are none.
        rounding: to what part of an example's largest gradient the others were rounded.

    Returns:
        None if nothing is known: if no label has a gradient, or a few examples of two classes have weights.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1.0]).double()
        >>> tell_classes(logits, logits.softmax(1) - torch.tensor([0, 1, 0]), labels)
        True
        >>> tell_classes(logits, torch.tensor([[-0.12, 0.73, 0.5]]), labels)  # of thresholds: 1 less below the label
        False
        >>> tell_classes(logits - torch.tensor([2.0, 0, 0]), logits.softmax(1) - torch.tensor([0, 1, 0]), labels)
        False
    """
    counts = (labels >= 0) & gradients.isfinite().all(1) & logits.isfinite().all(1)
    counts &= (gradients != 0).any(1)  # a loss may leave out examples
    logits, gradients, numbers = logits[counts].double(), gradients[counts].double(), labels[counts].long()
    total = float(gradients.square().sum())
    if not total:
        return None
    has_others = int(numbers.max()) >= logits.shape[1]  # labels that are shown may be counted otherwise than classes
    if has_others:
        shown, numbers = numbers, gradients.argmin(1)
        pairs = set(zip(shown.tolist(), numbers.tolist(), strict=True))
        if len(pairs) > len(set(numbers.tolist())):  # of clusters, each has several
            return False
    others = ~functional.one_hot(numbers, logits.shape[1]).bool()
    rounded = rounding * logits.shape[1] * gradients.abs().amax(1)
    if float(gradients.sum(1).square().sum()) > _ADDS_UP * total + float(rounded.square().sum()):
        return not has_others and any(_of_each(gradients, said, others) for said in (logits.sigmoid(), logits))
    said = logits.softmax(1)
    if torch.allclose(gradients, said - (~others).double(), atol=_EXACT):
        return True
    of_label = -gradients[~others]
    step = rounding * of_label[:, None]
    fits = _spread_as(said, gradients, others, step) and _as_large_as(said[~others], of_label, numbers)
    fits = fits or _is_hinge(logits, gradients, others, numbers, step)
    n_fitted = 0 if logits.shape[1] > 2 else len(torch.unique(numbers))  # of two classes, a multiple for each fits much
    if not fits:
        return False
    return True if len(numbers) > _FEW + n_fitted else None


def _spread_as(said: Tensor, gradients: Tensor, others: Tensor, step: Tensor) -> bool:
    """Whether an example's gradients at the other classes are a multiple of the probabilities, less what is smoothed.

    Args:
        said: (B, C) the probabilities.
        gradients: (B, C).
        others: (B, C) all classes but the label.
        step: (B, 1) to which the gradients were rounded.
    """
    said, wanted = said * others, gradients * others
    most = _LEFT * float(wanted.square().sum()) + float((step * others).square().sum())
    for share in torch.linspace(0, _MOST_SMOOTHED, 26).tolist():
        directions = functional.normalize((said - share / said.shape[1]) * others, dim=1)
        lengths = (wanted * directions).sum(1, keepdim=True).clamp(min=0)
        if float((wanted - lengths * directions).square().sum()) <= most:
            return True
    smoothed = torch.zeros(said.shape[1], dtype=torch.float64)
    # Least squares of a multiple for each example, and then of what each class is smoothed by, which fit any few.
    for _ in range(_ROUNDS if len(said) > _FEW else 0):
        factors = ((wanted + smoothed * others) * said).sum(1) / said.square().sum(1).clamp(min=1e-300)
        rest = factors[:, None] * said - wanted
        is_smoothing = float(smoothed.sum()) <= _MOST_SMOOTHED * float(factors.mean())
        if is_smoothing and float((rest - smoothed * others).square().sum()) <= most:
            return True
        smoothed = ((rest * others).sum(0) / others.sum(0).clamp(min=1)).clamp(min=0)
    return False


def _as_large_as(said: Tensor, gradients: Tensor, numbers: Tensor) -> bool:
    """Whether gradients at labels are as large as those of a cross-entropy, times a constant of each label.

    Args:
        said: (B,) the probability of each example's label.
        gradients: (B,) minus those at it.
        numbers: (B,) the labels.
    """
    missing, logs = 1 - said, -said.clamp(min=1e-300).log()
    forms = [missing**power * (missing + power * said * logs) for power in _FOCAL]
    forms += [said**power * missing for power in _ROBUST]
    smoothed = torch.stack([missing - share for share in torch.linspace(0, _MOST_SMOOTHED, 26).tolist()])

    def left(shapes: Tensor) -> Tensor:
        """(labels, n) the squares that multiples of n shapes leave of each label."""
        found: list[Tensor] = []
        for number in torch.unique(numbers):
            shape, wanted = shapes[:, numbers == number], gradients[numbers == number]
            factors = (shape @ wanted / shape.square().sum(1).clamp(min=1e-300)).clamp(min=0)
            found.append((factors[:, None] * shape - wanted).square().sum(1))
        return torch.stack(found)

    least = min(float(left(torch.stack(forms)).sum(0).min()), float(left(smoothed).amin(1).sum()))
    return least <= _LEFT_OF_LABEL * float(gradients.square().sum())


def _is_hinge(logits: Tensor, gradients: Tensor, others: Tensor, numbers: Tensor, step: Tensor) -> bool:
    """Whether gradients are alike for each label, at the classes of the largest logits beside it, and else 0."""
    wanted = gradients * others
    of_label = torch.zeros(logits.shape[1], dtype=torch.float64).scatter_reduce(0, numbers, wanted.amax(1), "amax")
    largest = of_label[numbers][:, None]
    pushed = wanted > largest / 2
    are_alike = bool(((wanted - largest * pushed).abs() <= _EXACT * largest + step.max()).all())
    lowest = logits.masked_fill(~pushed, math.inf).amin(1)
    return are_alike and bool((lowest >= logits.masked_fill(pushed | ~others, -math.inf).amax(1)).all())


def _of_each(gradients: Tensor, said: Tensor, others: Tensor) -> bool:
    """Whether gradients are those of a loss for each class: what is said less 1 at the label, times a constant."""
    errors = 0.0
    for part in (others, ~others):
        differences, found = (said - (~others).double())[part], gradients[part]
        square = float(differences.square().sum())
        factor = max(0.0, float((differences * found).sum()) / square) if square else 0.0
        errors += float((found - factor * differences).square().sum())
    return errors <= _LEFT * float(gradients.square().sum())


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
