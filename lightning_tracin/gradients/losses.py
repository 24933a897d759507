"""One loss for each example, from a Hugging Face output."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tracin.gradients.batches import described_batch, labels_of
from lightning_tracin.parallel.fsdp import cast_to

OVERRIDE = "Override influence_loss(batch) to return one unreduced loss for each example, shape (B,)"

# Classes of transformers whose logits at a position predict the next token, so that the labels are shifted by one.
_CAUSAL = re.compile(r"CausalLM|LMHeadModel|DoubleHeads|WithLMHead$")

_IGNORED = -100  # transformers' label of a position that has no loss


def hugging_face_losses(module: nn.Module, batch: Any) -> Tensor:
    """The losses of a batch's examples, for a module whose forward returns a Hugging Face output with ``logits``.

    Classification, multi-label classification, regression, token classification, masked and causal language models
    are told apart by the labels' shape and the config's ``problem_type``, as transformers does. An example with
    many labels (tokens, classes, targets) has their mean as its loss: what the model itself returns for a batch of
    one. Where the output carries the batch's own loss, the result is checked against it.

    Args:
        module: its forward takes the batch, or the batch's entries by name.
        batch: a mapping with ``labels`` (or ``label``).

    Returns:
        (B,) float tensor.

    Raises:
        ValueError: if the batch, the output or the loss is not of such a form; the message names ``influence_loss``.
    """
    labels = labels_of(batch)
    if not isinstance(batch, Mapping) or labels is None:
        raise ValueError(
            f"{type(module).__name__} has no loss for each example: the default influence_loss needs a batch that is "
            f"a mapping with 'labels', but got {described_batch(batch)}. {OVERRIDE}."
        )
    output = _forward(module, batch)
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(module).__name__} has no loss for each example: its forward returned {type(output).__name__}, "
            f"not a Hugging Face output with logits. {OVERRIDE}."
        )
    model = hugging_face_model(module)
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    values, counted = _elementwise(logits.float(), labels, problem_type=problem_type, causal=_is_causal(model))
    values, counted = values.flatten(1), counted.flatten(1)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.dim() == 0 and bool(counted.any()):
        mean = values.sum() / counted.sum()
        rounded = 1e-3 if own.element_size() > 2 else 2e-2
        if not torch.isclose(mean.detach(), own.detach().float(), rtol=rounded, atol=1e-5):
            raise ValueError(
                f"The model's own loss is {own.item():.6g}, but the mean of its examples' losses, as far as their "
                f"logits and labels tell, is {mean.item():.6g}: {type(model).__name__} computes its loss in another "
                f"way. {OVERRIDE}."
            )
    return values.sum(1) / counted.sum(1).clamp(min=1)


def label_counts(module: nn.Module, batch: Any) -> Tensor | None:
    """How many tokens of each example have a label, (B,): a model's own loss is a mean over all of them.

    None where examples have one label each, or it is not for :func:`hugging_face_losses` to say.
    """
    labels = labels_of(batch)
    model = hugging_face_model(module)
    if model is None or labels is None or labels.dim() < 2 or labels.is_floating_point():
        return None
    return (labels[:, 1:] if _is_causal(model) else labels).ne(_IGNORED).flatten(1).sum(1)


def _is_causal(model: nn.Module | None) -> bool:
    """Whether a model of transformers shifts its labels by one."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(_CAUSAL.search(type(model).__name__)) and not encoder_decoder


def is_half(module: nn.Module) -> bool:
    """Whether a module computes in numbers of 16 bits: by autocast, by its weights, or by what FSDP casts them to."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return True
    kinds = {parameter.dtype for parameter in module.parameters()} | cast_to(module)
    return not kinds.isdisjoint((torch.bfloat16, torch.float16))


def _elementwise(logits: Tensor, labels: Tensor, *, problem_type: str | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The loss at each label, (B, ...), and which of the labels count, of the same shape."""
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
        values = functional.cross_entropy(logits.movedim(-1, 1), labels.long(), ignore_index=_IGNORED, reduction="none")
        counted = labels != _IGNORED
        if values.dim() == 1:
            return values[:, None], counted[:, None]
        return values, counted
    raise ValueError(
        f"Cannot tell the loss from logits {tuple(logits.shape)} and labels {labels.dtype} {tuple(labels.shape)} "
        f"(problem_type {problem_type!r}). {OVERRIDE}."
    )


def _forward(module: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call the module with the whole batch, or with those of its entries that forward takes by name."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return module(**batch)
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL}
    if named & batch.keys():
        return module(**{name: value for name, value in batch.items() if name in named})
    return module(batch)


def hugging_face_model(module: nn.Module) -> nn.Module | None:
    """The model of transformers inside the module, whatever wraps it; told by its base class, without the import."""
    for part in module.modules():
        if any(base.__name__ == "PreTrainedModel" for base in type(part).__mro__):
            return part
    return None
