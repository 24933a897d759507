"""One loss for each example: from a Hugging Face output, or from a mean that is checked to be one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy, deepcopy
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection

from lightning_tracin.precision import full_precision
from lightning_tracin.sharded import cast_to, forwarded

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
            f"a mapping with 'labels', but got {_described(batch)}. {OVERRIDE}."
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


def labels_of(batch: Any) -> Tensor | None:
    """The batch's labels, where they can be told: by name in a mapping, the last entry of a pair."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
    else:
        labels = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return labels if isinstance(labels, Tensor) else None


class MeanLoss:
    """The losses of a module that only has a ``training_step`` which returns their mean.

    The gradient of the sum of the examples' losses is B times the gradient of their mean, so the mean repeated B times
    stands for them. That it *is* the mean of independent losses is checked by :meth:`check`, on a first batch.

    Args:
        module: a LightningModule with automatic optimization.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, batch: Any) -> Tensor:
        """The mean loss of a batch, repeated for each of its examples, (B,)."""
        return forwarded(self.module, self._training_loss, batch).expand(_size(batch))

    def rows(self, batch: Any) -> list[Any]:
        """The examples of a batch, each as a batch of its own."""
        size = _size(batch)
        return [row_of(batch, row, size) for row in range(size)]

    @full_precision()
    def check(self, batch: Any) -> None:
        """Check that the loss of the batch is the mean of the losses of its rows.

        Raises:
            ValueError: if it is not, or cannot be computed; the message names ``TracInMixin``.
        """
        with torch.no_grad():
            whole = float(forwarded(self.module, self._training_loss, batch))
            rows = [float(forwarded(self.module, self._training_loss, row)) for row in self.rows(batch)]
        mean = sum(rows) / len(rows)
        tolerance = 2e-2 if is_half(self.module) else 1e-4
        if not abs(whole - mean) <= tolerance * max(abs(whole), abs(mean)) + 1e-7:
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {whole:.6g} for a batch of {len(rows)} "
                f"examples, but {mean:.6g} is the mean of what it returned for each of them alone: its loss is not a "
                f"mean of independent losses. {_use_mixin()}."
            )

    def check_batch_first(self, batch: Any, layers: Sequence[nn.Module]) -> None:
        """Check that layers are called with the examples in the first dimension; with only a mean, nothing tells later.

        Raises:
            ValueError: if one is called with time first.
        """
        shapes: list[torch.Size] = []
        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hooks.callback(layer.register_forward_hook(lambda _, __, output: shapes.append(output.shape)).remove)
            forwarded(self.module, self._training_loss, row_of(batch, 0, _size(batch)))
        if any(len(shape) > 2 and shape[0] > 1 == shape[1] for shape in shapes):
            raise ValueError(
                f"{type(self.module).__name__} calls a layer with time in the first dimension, where the mean that its "
                f"training_step returns does not tell examples from positions. {_use_mixin()}."
            )

    def _training_loss(self, batch: Any) -> Tensor:
        if not getattr(self.module, "automatic_optimization", True):
            raise ValueError(f"{type(self.module).__name__} optimizes manually in training_step. {_use_mixin()}.")
        module = _stand_in(self.module)
        for name in ("log", "log_dict"):  # there is nothing to log outside of training
            module.__dict__[name] = lambda *_, **__: None
        step = module.training_step
        batch = shallow(batch)
        try:
            output = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # it looks for what only training has
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"The training_step of {type(self.module).__name__} cannot be called by itself: {why}. {_use_mixin()}."
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {_described(output)}, not one mean loss. "
                f"{_use_mixin()}."
            )
        return loss.reshape(())


@full_precision()
def check_batching(
    module: nn.Module,
    losses: Callable[[Any], Tensor],
    batch_of: Callable[[Sequence[int]], Any],
    indices: Sequence[int],
    whole: Any,
    of_whole: Tensor,
) -> None:
    """Check that the losses of a few examples do not depend on which others are in their batch.

    They are batched once more as a whole, and in two halves, one of which may be padded less. Where the whole differs
    from what it was (the collate function masks words at random, say), nothing can be told.

    Args:
        module: the module, in eval mode.
        losses: from a batch to its examples' losses.
        batch_of: from indices of examples to their batch, on the module's device.
        indices: of the examples.
        whole: their batch.
        of_whole: (len(indices),) the losses in it, on the CPU.

    Raises:
        ValueError: if a loss depends on how many others there are.
    """
    if len(indices) < 2:
        return
    with torch.no_grad():
        batches = [batch_of(each) for each in (indices, indices[::2], indices[1::2])]
        again, *of_halves = [losses(batch).float().cpu() for batch in batches]
    if not len(of_whole) == len(again) == sum(map(len, of_halves)) == len(indices):
        return  # the collate function drops or adds examples, which is told later
    joined = of_whole.new_empty(len(indices))
    joined[::2], joined[1::2] = of_halves
    if isinstance(losses, MeanLoss):  # which gives the mean alone
        of_whole, again, joined = (each.mean()[None] for each in (of_whole, again, joined))
    worst = int((joined - of_whole).abs().argmax())
    tolerance = 5e-2 if is_half(module) else 1e-3
    repeats, same = (torch.allclose(each, of_whole, rtol=tolerance, atol=1e-6) for each in (again, joined))
    if same or not repeats:
        return
    name, size = type(module).__name__, len(indices)
    which = "losses are" if isinstance(losses, MeanLoss) else f"the loss of training example {indices[worst]} is"
    found = f"{which} {float(of_whole[worst]):.4g} in a batch of {size}, but {float(joined[worst]):.4g} in one of half"
    if isinstance(losses, MeanLoss) or _widths(batches[1 + worst % 2]) != _widths(whole):
        rank_zero_warn(
            f"{name} seems to read padding: {found} of them, which is padded less. Scores then depend on how examples "
            "are batched. Mask the padding, or pack it (torch.nn.utils.rnn.pack_padded_sequence)."
        )
        return
    raise ValueError(
        f"The losses of {name} depend on the batch: {found} of them. Divide an example's loss by what it holds itself "
        "(its tokens, its outputs), never by what its batch does."
    )


def _widths(batch: Any) -> list[torch.Size]:
    """The shapes of a batch's tensors without their first dimension."""
    return [tensor.shape[1:] for tensor in tensors_of(batch)]


def is_half(module: nn.Module) -> bool:
    """Whether a module computes in numbers of 16 bits: by autocast, by its weights, or by what FSDP casts them to."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return True
    kinds = {parameter.dtype for parameter in module.parameters()} | cast_to(module)
    return not kinds.isdisjoint((torch.bfloat16, torch.float16))


def _stand_in(module: nn.Module) -> Any:
    """A module that shares another's layers and weights, and keeps what a ``training_step`` remembers to itself.

    Its attributes, lists, buffers and metrics are its own.
    """
    copied: Any = object.__new__(type(module))
    for name, value in vars(module).items():
        copied.__dict__[name] = copy(value) if isinstance(value, (list, dict, set)) else value
    for name, buffer in module._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            copied._modules[name] = deepcopy(child)
        elif any(isinstance(part, Metric) for part in child.modules()):
            copied._modules[name] = _stand_in(child)
    return copied


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


def shallow(batch: Any) -> Any:
    """A batch of the same entries, to be kept, or to be handed to who may take entries out of it."""
    return copy(batch) if isinstance(batch, (Mapping, list)) else batch


def batch_size(batch: Any) -> int | None:
    """The length of the first dimension of the batch's first tensor."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim() > 0), None)


def tensors_of(batch: Any) -> list[Tensor]:
    """The batch's tensors, in their order."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors


def row_of(batch: Any, row: int, size: int) -> Any:
    """The batch of one example; whatever has one entry for each example is cut, the rest is kept."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[row : row + 1] if value.dim() > 0 and len(value) == size else value
        if isinstance(value, Mapping):
            cut_values = {name: cut(each) for name, each in value.items()}
            return cut_values if type(value) is dict else type(value)(cut_values)  # type: ignore[call-arg]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(each) for each in value))
        if isinstance(value, (list, tuple)):
            if len(value) == size and not any(isinstance(each, (Tensor, Mapping, list, tuple)) for each in value):
                return type(value)(value[row : row + 1])
            return type(value)(cut(each) for each in value)
        return value

    return cut(batch)


def _size(batch: Any) -> int:
    size = batch_size(batch)
    if size is None:
        raise ValueError(f"Cannot tell how many examples a batch of {_described(batch)} holds. {_use_mixin()}.")
    return size


def _use_mixin() -> str:
    mixin = "Put TracInMixin before LightningModule in the bases, and override influence_loss(batch)"
    return f"{mixin} (for a Hugging Face model, its default serves)"


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {sorted(map(str, value))}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
