"""One loss for each example: their form, and the losses of a module that returns a Hugging Face output."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tracin.gradients.batches import IGNORED, answers_of, described_batch, labels_of

#: A function from a batch to the losses of its examples, (B,). A module's mean loss is that mean repeated B times.
Losses: TypeAlias = Callable[[Any], Tensor]

OVERRIDE = "Override influence_loss(batch) to return one unreduced loss for each example, shape (B,)"

NOT_FINITE_ADVICE = (
    "Look at its label and its text (a class that the model lacks, no labelled token, a division by zero). Where it is "
    "so for every example, the weights are not finite: training has diverged, so lower the learning rate."
)

# Classes of transformers whose logits at a position predict the next token, so that labels are shifted by one position.
_CAUSAL = re.compile(r"CausalLM|LMHeadModel|DoubleHeads|WithLMHead$")


class DependsOnBatch(ValueError):
    """The loss of an example depends on what else its batch holds."""


def checked_losses(losses: object) -> Tensor:
    """The losses of a batch, after a check that there is one for each example.

    Raises:
        ValueError: if they are not a float tensor of shape (B,), or if B is 0.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            "influence_loss must return one unreduced loss for each example of the batch, a float tensor of shape "
            f"(B,), but got {got}. Use reduction='none', and average over an example's own tokens or outputs only."
        )
    if len(losses) == 0:
        raise ValueError("influence_loss returned no loss: the batch is empty.")
    return losses


def make_earlier(module: nn.Module, error: Exception) -> str:
    """What to do where a module's step or loss fails by an attribute that only a hook of training gives the module.

    Args:
        module: the module.
        error: what was raised.

    Returns:
        A sentence with a space after it; an empty string for any other error.
    """
    if not isinstance(error, AttributeError) or type(error.obj) is not type(module):
        return ""
    return (
        f"Make self.{error.name} in __init__: before training, and where a question is asked, hooks such as "
        "on_train_start have not made it. "
    )


def require_one_each(n_losses: int, n_examples: int, kind: str) -> None:
    """Check that a batch has one loss for each example that it was collated of.

    Args:
        n_losses: of the batch.
        n_examples: that the collate function was given.
        kind: "training" or "test", for the message.

    Raises:
        ValueError: if it has not.
    """
    if n_losses != n_examples:
        raise ValueError(
            f"A batch of {n_examples} {kind} examples has {n_losses} losses: the collate function drops or adds "
            "examples, as one that packs texts or cuts them into windows, so that they cannot be numbered, or "
            "influence_loss does not return one loss for each. Do in the data set what makes other rows, so that each "
            "of its items is one row of a batch."
        )


def hugging_face_losses(module: nn.Module, batch: Any) -> Tensor:
    """The losses of a batch's examples, for a module whose forward returns a Hugging Face output with ``logits``.

    The labels' shape and the config's ``problem_type`` select the loss, as in transformers: classification, multi-label
    classification, multiple choice, regression, token classification, masked or causal language modelling. The loss of
    an example with many labels (tokens, classes, targets) is the mean over them, which the model itself returns for a
    batch of one. Of an answer's ``start_positions`` and ``end_positions`` it is the mean of both. If the output
    contains the batch's loss, the mean of the result is checked against it.

    Args:
        module: a module whose forward takes the batch, or the batch's entries by name.
        batch: a mapping with ``labels`` (or ``label``), or with ``start_positions`` and ``end_positions``.

    Returns:
        (B,) float tensor.

    Raises:
        ValueError: if the batch or the output has another form, or the model computes another loss; the message names
            ``influence_loss``.
    """
    labels, answers = labels_of(batch), answers_of(batch)
    if not isinstance(batch, Mapping) or (labels is None and answers is None):
        raise ValueError(
            f"{type(module).__name__} has no loss for each example: the default influence_loss needs a batch that is "
            "a mapping with 'labels', or with 'start_positions' and 'end_positions', but got "
            f"{described_batch(batch)}. {OVERRIDE}."
        )
    output = called_with(module, batch)
    model = hugging_face_model(module)
    if labels is None and answers is not None:
        values, counted = _of_answers(module, answer_logits(output), answers)
        losses, mean = values.mean(1), (values.sum(0) / counted.sum(0)).mean()
    else:
        assert labels is not None
        logits = output_entry(output, "logits")
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(module).__name__} has no loss for each example: its forward returned {type(output).__name__}, "
                f"not a Hugging Face output with logits. {OVERRIDE}."
            )
        problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        values, counted = elementwise_losses(logits.float(), labels, problem_type=problem_type, causal=is_causal(model))
        values, counted = values.flatten(1), counted.flatten(1)
        losses, mean = values.sum(1) / counted.sum(1).clamp(min=1), values.sum() / counted.sum()
    model_loss = output_entry(output, "loss")
    has_mean = bool(counted.any()) if labels is not None else bool(counted.any(0).all())  # of answers, of each side
    comparable = isinstance(model_loss, Tensor) and model_loss.dim() == 0 and has_mean
    if comparable and bool(mean.isfinite() | model_loss.isfinite()):  # whoever asked tells which example's is NaN
        tolerance = 1e-3 if model_loss.element_size() > 2 else 2e-2
        if not torch.isclose(mean.detach(), model_loss.detach().float(), rtol=tolerance, atol=1e-5):
            raise ValueError(
                f"The model's own loss is {model_loss.item():.6g}, but the mean of its examples' losses, as far as "
                f"their logits and labels tell, is {mean.item():.6g}: {type(model).__name__} computes its loss in "
                f"another way. {OVERRIDE}."
            )
    return losses


def output_entry(output: Any, name: str) -> Any:
    """An entry of a model's output, which may be a mapping; None if it has none of this name."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def answer_logits(output: Any) -> tuple[Tensor, Tensor] | None:
    """The logits of where answers start and end, (B, T) each, in a model's output; None if it has none."""
    start, end = (output_entry(output, f"{side}_logits") for side in ("start", "end"))
    return (start, end) if all(isinstance(each, Tensor) and each.dim() == 2 for each in (start, end)) else None


def _of_answers(
    module: nn.Module, logits: tuple[Tensor, Tensor] | None, answers: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The losses of where answers start and end, (B, 2), and which of them count: those inside of the text.

    As in transformers: a place before the text is its first position, one behind it has no loss.
    """
    if logits is None:
        raise ValueError(
            f"{type(module).__name__} has no loss for each example: for a batch with start_positions and end_positions "
            f"its forward must return a Hugging Face output with start_logits and end_logits, (B, T). {OVERRIDE}."
        )
    places = [each.clamp(0, side.shape[1]) for each, side in zip(answers, logits, strict=True)]
    values = [
        functional.cross_entropy(side.float(), place, ignore_index=side.shape[1], reduction="none")
        for side, place in zip(logits, places, strict=True)
    ]
    counted = [place < side.shape[1] for side, place in zip(logits, places, strict=True)]
    return torch.stack(values, 1), torch.stack(counted, 1)


def label_counts(module: nn.Module, batch: Any) -> Tensor | None:
    """The number of labelled tokens of each example, (B,), over all of which a model's own loss is a mean.

    Of questions, 1 or, where the answer is not in the text, 0.

    Returns:
        None if each example has one label, or if the module contains no model of transformers.
    """
    labels, answers = labels_of(batch), answers_of(batch)
    model = hugging_face_model(module)
    if model is not None and labels is None and answers is not None:
        ids = batch.get("input_ids")
        return (answers[0] < ids.shape[-1]).long() if isinstance(ids, Tensor) else None
    if model is None or labels is None or labels.dim() < 2 or labels.is_floating_point():
        return None
    return (labels[:, 1:] if is_causal(model) else labels).ne(IGNORED).flatten(1).sum(1)


def hugging_face_model(module: nn.Module) -> nn.Module | None:
    """The model of transformers inside the module, through any wrappers; None if there is none.

    The name of a base class identifies it, so that transformers need not be installed.
    """
    for submodule in module.modules():
        if any(base.__name__ == "PreTrainedModel" for base in type(submodule).__mro__):
            return submodule
    return None


def writes_tokens(model: nn.Module | None) -> bool:
    """Whether a model of transformers says tokens of its vocabulary."""
    return bool(re.search(r"LM(Head|$)|ConditionalGeneration|DoubleHeads", type(model).__name__))


def writes_apart(model: nn.Module | None) -> bool:
    """Whether a model of transformers reads one text and writes another, its labels."""
    return writes_tokens(model) and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module | None) -> bool:
    """Whether a model of transformers shifts its labels by one position."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(_CAUSAL.search(type(model).__name__)) and not encoder_decoder


def elementwise_losses(
    logits: Tensor, labels: Tensor, *, problem_type: str | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The loss at each label, (B, ...), and a mask of the labels that count, of the same shape."""
    regression = problem_type == "regression" or (problem_type is None and logits.dim() == 2 and logits.shape[1] == 1)
    if regression and labels.numel() == logits.numel():
        values = (logits - labels.view_as(logits).float()) ** 2
        return values, torch.ones_like(values, dtype=torch.bool)
    if labels.shape == logits.shape and (problem_type == "multi_label_classification" or labels.is_floating_point()):
        values = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        return values, torch.ones_like(values, dtype=torch.bool)
    if logits.dim() == labels.dim() + 1 and logits.shape[:-1] == labels.shape and not labels.is_floating_point():
        if causal and labels.dim() > 1:
            logits, labels = logits[:, :-1], labels[:, 1:]
        values = functional.cross_entropy(logits.movedim(-1, 1), labels.long(), ignore_index=IGNORED, reduction="none")
        counted = labels != IGNORED
        if values.dim() == 1:
            return values[:, None], counted[:, None]
        return values, counted
    raise ValueError(
        f"Cannot tell the loss from logits {tuple(logits.shape)} and labels {labels.dtype} {tuple(labels.shape)} "
        f"(problem_type {problem_type!r}). {OVERRIDE}."
    )


def called_with(module: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call the module with the whole batch, or with the entries that its forward takes by name."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return module(**batch)
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL}
    if named & batch.keys():
        return module(**{name: value for name, value in batch.items() if name in named})
    return module(batch)
