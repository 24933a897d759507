"""The losses of a module whose ``training_step`` returns only their mean, and the checks that this requires."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import copy, deepcopy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_tracin.gradients.batches import (
    batch_size,
    counts_of,
    described_batch,
    labels_of,
    row_of,
    shallow_copy,
)
from lightning_tracin.gradients.calls import Call
from lightning_tracin.gradients.layouts import Layout
from lightning_tracin.gradients.losses import NOT_FINITE_ADVICE, DependsOnBatch, make_earlier
from lightning_tracin.gradients.precision import full_precision, loss_tolerance, uses_half_precision
from lightning_tracin.gradients.unwritten import parameters_unwritten
from lightning_tracin.parallel.fsdp import call_in_forward_pass, is_fsdp

_MOST_COUNTS = 8  # different numbers of labels that are looked at: each check costs a pass for every example


class MeanLoss:
    """The losses of a module whose ``training_step`` returns only their mean.

    The gradient of the sum of the examples' losses is B times the gradient of their mean, so the mean repeated B times
    takes the place of the losses. :meth:`check` verifies on a first batch that it is a mean of independent losses.

    Args:
        module: a LightningModule with automatic optimization.
        n_examples: number of examples in a batch, where that is known; None to take it from the batch's first tensor.
        labels_of: what says the labels of a batch.
    """

    def __init__(
        self,
        module: nn.Module,
        n_examples: int | None = None,
        *,
        labels_of: Callable[[Any], Tensor | None] = labels_of,
    ) -> None:
        self.module = module
        self._n_examples = n_examples
        self._labels_of = labels_of
        self._counts: set[int] = set()

    def __call__(self, batch: Any) -> Tensor:
        """The mean loss of a batch, repeated for each of its examples, (B,).

        Raises:
            ValueError: if ``training_step`` fails outside of training, or does not return one mean loss.
        """
        size = self._n_examples or _size(batch)
        return call_in_forward_pass(self.module, self._training_loss, batch).expand(size)

    def rows(self, batch: Any) -> list[Any]:
        """The examples of a batch, each as a batch of one."""
        size = _size(batch)
        return [row_of(batch, row, size) for row in range(size)]

    def check_new(self, batch: Any) -> None:
        """Check a batch that holds examples of different numbers of labels, some of which none before it held.

        A mean over all labels of a batch is none over its examples; where these have as many each, it looks like one.
        More passes than a batch's own are too many for FSDP.

        Raises:
            ValueError: see :meth:`check`.
        """
        counts = set(counts_of(self._labels_of(batch)) or ())
        is_known = len(counts) < 2 or counts <= self._counts or len(self._counts) > _MOST_COUNTS
        if is_known or is_fsdp(self.module):
            return
        self.check(batch)

    @full_precision()
    def check(self, batch: Any) -> None:
        """Check that the loss of the batch is the mean of its examples' losses, each computed in a batch of one.

        Raises:
            ValueError: if it is not, or if a loss cannot be computed; the message names ``TracInMixin``. Or if it is
                NaN or infinite.
        """
        with torch.no_grad():
            batch_loss = float(call_in_forward_pass(self.module, self._training_loss, batch))
            losses = [float(call_in_forward_pass(self.module, self._training_loss, row)) for row in self.rows(batch)]
        bad = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None and not math.isfinite(batch_loss):
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {batch_loss:g} for a batch of "
                f"{len(losses)} examples, and {losses[bad]:g} for number {bad} of them alone: a loss must be a finite "
                f"number. {NOT_FINITE_ADVICE}"
            )
        mean = sum(losses) / len(losses)
        tolerance = 2e-2 if uses_half_precision(self.module) else 1e-4
        if not abs(batch_loss - mean) <= tolerance * max(abs(batch_loss), abs(mean)) + 1e-7:
            raise DependsOnBatch(
                f"The training_step of {type(self.module).__name__} returned {batch_loss:.6g} for a batch of "
                f"{len(losses)} examples, but {mean:.6g} is the mean of what it returned for each of them alone: its "
                f"loss is not a mean of independent losses. {_use_mixin()}."
            )
        counts = set(counts_of(self._labels_of(batch)) or ())
        self._counts |= counts if len(counts) > 1 else set()

    @full_precision()
    def layouts(self, batch: Any, layers: Sequence[nn.Module]) -> dict[nn.Module, Layout]:
        """Where the examples are in the calls of those layers that are called, as far as calls with one example show.

        Gradients of a mean loss cannot show it. Where a layer is called on several rows for each example, those are an
        example's own that it is called with when the example is alone.

        Args:
            batch: a batch of the module.
            layers: the layers that gradients are taken at.

        Raises:
            ValueError: if a layer is called with time in the first dimension, or on rows that cannot be told apart.
        """
        rows = self.rows(batch)
        calls, first = self._calls(batch, layers), self._calls(rows[0], layers)
        alone = [first]
        if any(call.positions[0] != len(rows) for call in calls):
            alone += [self._calls(row, layers) for row in rows[1:]]
        found: dict[nn.Module, Layout] = {}
        for number, call in enumerate(calls):
            own = [each[number] for each in alone if len(each) == len(calls)]
            if own and _is_time_first(call.positions, own[0].positions, len(rows)):
                raise ValueError(
                    f"{type(self.module).__name__} calls a layer with time in the first dimension, where the mean that "
                    f"its training_step returns does not tell examples from positions. {_use_mixin()}."
                )
            # What is called on as many rows for one example alone is shared by all: no row is an example's own.
            is_shared = len(rows) > 1 and bool(own) and own[0].positions == call.positions
            if call.positions[0] == len(rows) and not is_shared:
                found.setdefault(call.layer, Layout())
            else:
                found[call.layer] = self._layout_of_rows(call, own, len(rows))
        if len(rows) == 1:
            return found
        return {
            layer: layout.having_seen(len(rows), [call for call in calls if call.layer is layer])
            for layer, layout in found.items()
        }

    def _layout_of_rows(self, call: Call, alone: Sequence[Call], n_examples: int) -> Layout:
        """The layout by which an example's rows of a call are those that the layer is called on when it is alone."""
        tolerance = loss_tolerance(self.module)
        errors = {Layout(together=together): torch.inf for together in (True, False)}
        if len(alone) == n_examples and len(call.inputs) % n_examples == 0:
            for layout in errors:
                owners = layout.owners(n_examples, call.inputs.shape[:1]).to(call.inputs.device)
                errors[layout] = max(_error(call.inputs[owners == i], own.inputs) for i, own in enumerate(alone))
        best = min(errors, key=lambda layout: errors[layout])
        if errors[best] <= tolerance:
            return best
        raise ValueError(
            f"{type(self.module).__name__} calls a layer on positions of shape {tuple(call.positions)} for "
            f"{n_examples} examples, where the mean that its training_step returns does not tell which are whose. "
            f"{_use_mixin()}."
        )

    @torch.no_grad()
    def _calls(self, batch: Any, layers: Sequence[nn.Module]) -> list[Call]:
        """The calls of some layers in a forward pass."""
        calls: list[Call] = []

        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(Call.of(layer, args, kwargs, output))

        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_hook(record, with_kwargs=True).remove)
            call_in_forward_pass(self.module, self._training_loss, batch)
        return calls

    def _training_loss(self, batch: Any) -> Tensor:
        """The loss that ``training_step`` returns for a batch, as a scalar."""
        if not getattr(self.module, "automatic_optimization", True):
            raise ValueError(f"{type(self.module).__name__} optimizes manually in training_step. {_use_mixin()}.")
        module = _stand_in(self.module)
        for name in ("log", "log_dict"):  # Lightning refuses to log outside of its loops
            module.__dict__[name] = lambda *_, **__: None
        step = module.training_step
        batch = shallow_copy(batch)
        args = (batch, 0) if len(inspect.signature(step).parameters) > 1 else (batch,)
        try:
            # FSDP itself writes into parameters, to gather them.
            with nullcontext() if is_fsdp(self.module) else parameters_unwritten(self.module):
                output = step(*args)
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
        ) as error:  # it may need what only training sets up
            why = f"{type(error).__name__}: {error}"
            earlier = make_earlier(self.module, error)
            advice = f"{_use_mixin()}." if not earlier else f"Or p{_use_mixin()[1:]}."
            if callable(getattr(self.module, "influence_loss", None)):  # training's own gradients are wanted
                advice = 'cache="checkpoint" does without it.'
            raise ValueError(
                f"The training_step of {type(self.module).__name__} cannot be called by itself: {why}. "
                f"{earlier}{advice}"
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {described_batch(output)}, not one mean "
                f"loss. {_use_mixin()}."
            )
        return loss.reshape(())


def _stand_in(module: nn.Module) -> Any:
    """A copy of a module that shares its layers and weights, but none of the state that a ``training_step`` may change.

    Attributes, lists, dictionaries, sets, buffers and metrics are copied. Methods among the attributes, such as those
    that Lightning has put compiled ones before, are bound to the copy, and not compiled there.
    """
    copied: Any = object.__new__(type(module))
    compiled = getattr(module, "_compiler_ctx", None) or {}
    for name, value in vars(module).items():
        value = compiled.get(f"original_{name}", value)
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, copied)
        copied.__dict__[name] = copy(value) if isinstance(value, (list, dict, set)) else value
    for name, buffer in module._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            copied._modules[name] = deepcopy(child)
        elif any(isinstance(submodule, Metric) for submodule in child.modules()):
            copied._modules[name] = _stand_in(child)
    return copied


def _is_time_first(positions: torch.Size, alone: torch.Size, n_examples: int) -> bool:
    """Whether the second dimension of a call counts the examples, by the positions of a call with one of them alone."""
    return len(positions) > 1 and positions[1] == n_examples and alone[0] > 1 == alone[1]


def _error(values: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, as a part of their largest value; infinite if their shapes differ."""
    if values.shape != expected.shape:
        return torch.inf
    if not values.is_floating_point():
        return 0.0 if torch.equal(values, expected) else torch.inf
    values, expected = values.float(), expected.float()
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _size(batch: Any) -> int:
    """The number of examples in a batch.

    Raises:
        ValueError: if the batch contains no tensor that has one entry for each example.
    """
    size = batch_size(batch)
    if size is None:
        raise ValueError(f"Cannot tell how many examples a batch of {described_batch(batch)} holds. {_use_mixin()}.")
    return size


def _use_mixin() -> str:
    mixin = "Put TracInMixin before LightningModule in the bases, and override influence_loss(batch)"
    return f"{mixin} (for a Hugging Face model, its default serves)"
