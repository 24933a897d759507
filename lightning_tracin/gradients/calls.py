"""Calls of layers, recorded by forward hooks: input, output, and the gradient of the loss at the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.bags import Bags
from lightning_tracin.gradients.embedding_layers import lookup_factor
from lightning_tracin.gradients.linear_layers import features_last, is_linear, require_linear
from lightning_tracin.gradients.losses import Losses, checked_losses

_NO_WORDS = (
    " If another layer reads the words, return it from influence_embedding_layer() of the module. If the encoder is "
    'meant to be under torch.no_grad, as in a linear probe, words have no gradients: take methods=("tracin-last",) in '
    'TracInCallback and method="tracin-last" in influence.'
)


@dataclass
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        layer: the layer that was called.
        inputs: a copy of its input; token ids (B, T) for an embedding layer.
        output: its output, at which the gradient is taken.
        gradient: the gradient of the sum of the losses at the output; None before the backward pass, and if no loss
            depends on this call.
        bags: how an ``nn.EmbeddingBag`` adds up its words; None for any other layer.
        factor: what an embedding layer multiplies the rows of its table by.
    """

    layer: nn.Module
    inputs: Tensor
    output: Tensor
    gradient: Tensor | None = None
    bags: Bags | None = None
    factor: float = 1.0

    @classmethod
    def of(cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        """A call from the arguments of a forward hook; the first tensor that the layer was given counts as its input.

        Raises:
            ValueError: if the layer does not take a tensor and return a tensor, is a bag without words' gradients, or a
                linear or embedding layer by its class that computes something else.
        """
        value = next((argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)), None)
        if value is None or not isinstance(output, Tensor):
            raise ValueError(f"The layer {layer} must take a tensor and return a tensor; it returned {type(output)}.")
        require_linear(layer, value, output)
        factor = lookup_factor(layer, value, output)
        bags = Bags.of(layer, args, kwargs) if isinstance(layer, nn.EmbeddingBag) else None
        return cls(layer, value.detach().clone(), output, bags=bags, factor=factor)

    @property
    def positions(self) -> torch.Size:
        """The shape of the positions that the layer was called on: that of its output without the features."""
        return features_last(self.layer, self.output).shape[:-1]

    @property
    def gradient_by_position(self) -> Tensor:
        """The gradient at the output, features last; zeros if no loss depends on this call."""
        gradient = torch.zeros_like(self.output) if self.gradient is None else self.gradient
        return features_last(self.layer, gradient)


@contextmanager
def recorded_calls(losses: Losses, batch: Any, layers: Sequence[nn.Module]) -> Iterator[tuple[Tensor, list[Call]]]:
    """The losses of a batch, (B,), and the calls of some layers that computed them.

    The hooks stay in place until the context ends, so that a backward pass that recomputes activations (activation
    checkpointing) meets the same hooks as the forward pass.

    Raises:
        ValueError: if no layer was called, or the losses are not (B,) or cannot be differentiated.
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
    """Append every call of a layer to ``calls`` while the context lasts.

    Args:
        layer: the layer.
        calls: the list to append to.
        cut: whether to detach the output from the graph before it, which then need not be differentiated.
        differentiate: whether to make the output differentiable; otherwise it stays as it is, without a gradient.
    """

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():  # the losses cannot depend on this call
            return output
        call = Call.of(layer, args, kwargs, output)
        if not differentiate:
            calls.append(call)
            return output
        if cut or not output.requires_grad:
            output = output.detach().requires_grad_()
        call.output = output
        calls.append(call)
        copy: Tensor = output.clone()  # the model may modify its copy in place; the gradient is taken at the original
        return copy

    handle = layer.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to False until the context ends.

    Autograd then stores no activations for the gradients of weights, and no graph before the hooked layers.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_()


def require_called(groups: Sequence[Sequence[nn.Module]], calls: Sequence[Call]) -> None:
    """Check that at least one layer of each group was called.

    Raises:
        ValueError: if no layer of a group was.
    """
    called = {call.layer for call in calls}
    for layers in groups:
        if layers and called.isdisjoint(layers):
            raise ValueError(
                f"The layer {layers[0]} was not called when the loss of a batch was computed, or where no gradient "
                "could be taken: inside of torch.no_grad, or of a checkpoint with use_reentrant=True (use False)."
                f"{'' if is_linear(layers[0]) else _NO_WORDS}"
            )


def require_dependent(losses: Tensor) -> None:
    """Check that losses can be differentiated.

    Raises:
        ValueError: if they are detached from the layers' outputs.
    """
    if not losses.requires_grad:
        raise ValueError(
            "The losses do not depend on the layers' outputs: influence_loss must not detach them or use torch.no_grad."
        )
