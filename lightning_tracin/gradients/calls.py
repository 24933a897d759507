"""Calls of layers, as forward hooks see them: what a layer was called with, and the gradient at its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.linear_layers import features_last
from lightning_tracin.gradients.losses import Losses, checked_losses


@dataclass
class Call:
    """One call of a layer in a forward pass, and the gradient at its output once a backward pass has given one."""

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    gradient: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        """From what a forward hook is given.

        Raises:
            ValueError: if the layer does not take a tensor and return a tensor.
        """
        value = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if value is None or not isinstance(output, Tensor):
            raise ValueError(f"The layer {layer} must take a tensor and return a tensor; it returned {type(output)}.")
        return cls(layer, value.detach().clone(), output)

    @property
    def positions(self) -> torch.Size:
        """The shape of the positions that the layer was called on."""
        return features_last(self.layer, self.output).shape[:-1]

    @property
    def gradient_by_position(self) -> Tensor:
        """The gradient at the output, features last; zeros where none has come."""
        gradient = torch.zeros_like(self.output) if self.gradient is None else self.gradient
        return features_last(self.layer, gradient)


@contextmanager
def recorded_calls(losses: Losses, batch: Any, layers: Sequence[nn.Module]) -> Iterator[tuple[Tensor, list[Call]]]:
    """The losses of a batch, and the calls of layers that led to them.

    Hooks stay for the backward pass: where that computes a part again (activation checkpointing), it must find the
    layers as they were.
    """
    calls: list[Call] = []
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(recording_hook(layer, calls, cut=False))
        per_example = checked_losses(losses(batch))
        require_called([layers], calls)
        require_dependent(per_example)
        yield per_example, list(calls)


@contextmanager
def recording_hook(layer: nn.Module, calls: list[Call], *, cut: bool, differentiate: bool = True) -> Iterator[None]:
    """Record the layer's calls; with ``cut`` nothing before its output is differentiated.

    Without ``differentiate`` its output stays as it is, and has no gradient.
    """

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():  # the losses cannot depend on it
            return output
        call = Call.of(layer, args, kwargs, output)
        if not differentiate:
            calls.append(call)
            return output
        if cut or not output.requires_grad:
            output = output.detach().requires_grad_()
        call.output = output
        calls.append(call)
        copy: Tensor = output.clone()  # the model may change it in place; the gradient is taken at the output itself
        return copy

    handle = layer.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Give no parameter a gradient: what only that would need is not kept, nor a graph before the hooked layers."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()


def require_called(groups: Sequence[Sequence[nn.Module]], calls: Sequence[Call]) -> None:
    """Check that of each group of layers at least one was called.

    Raises:
        ValueError: if none was.
    """
    called = {call.layer for call in calls}
    for layers in groups:
        if layers and called.isdisjoint(layers):
            raise ValueError(
                f"The layer {layers[0]} was not called when the loss of a batch was computed, or where no gradient "
                "could be taken: inside of torch.no_grad, or of a checkpoint with use_reentrant=True (use False)."
            )


def require_dependent(losses: Tensor) -> None:
    """Check that losses can be differentiated.

    Raises:
        ValueError: if they cannot.
    """
    if not losses.requires_grad:
        raise ValueError(
            "The losses do not depend on the layers' outputs: influence_loss must not detach them or use torch.no_grad."
        )
