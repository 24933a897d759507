"""The network as other libraries want it: tensors in, logits out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import TensorDataset
from transformers import PreTrainedModel

from benchmarks.evidence.examples import Examples


class Positional(nn.Module):
    """A network of the study that takes ids, mask and types in this order.

    Args:
        network: it takes a batch of ``examples.trimmed``; a copy of it is made, in eval mode.
        flat_convolutions: whether convolutions over a text become those over an image of height 1, which is the same
            function, for libraries that know no others.
    """

    def __init__(self, network: nn.Module, *, flat_convolutions: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        for part in self.network.children():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("eager")  # fused attention has no batching rule: vmap would be slow
                part.register_forward_pre_hook(_with_full_mask, with_kwargs=True)
        if flat_convolutions:
            for name, layer in list(self.network.named_modules()):
                if isinstance(layer, nn.Conv1d):
                    self.network.set_submodule(name, FlatConvolution(layer))

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Logits, (B, C)."""
        logits: Tensor = self.network({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
        return logits


def _with_full_mask(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What transformers makes of a mask itself, but looks at its values to do so, which vmap forbids."""
    hidden = named["attention_mask"][:, None, None] == 0
    full = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return inputs, {**named, "attention_mask": full}


class FlatConvolution(nn.Module):
    """A one-dimensional convolution as a two-dimensional one."""

    def __init__(self, layer: nn.Conv1d) -> None:
        super().__init__()
        width, padding = layer.kernel_size[0], layer.padding[0]
        self.layer = nn.Conv2d(layer.in_channels, layer.out_channels, (1, width), padding=(0, int(padding)))
        self.layer.load_state_dict({"weight": layer.weight[:, :, None], "bias": layer.bias})

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels, T) to (B, other channels, T)."""
        outputs: Tensor = self.layer(inputs[:, :, None])[:, :, 0]
        return outputs


def as_tensors(examples: Examples) -> TensorDataset:
    """Ids, mask, types and labels of each example."""
    return TensorDataset(examples.ids, examples.mask, examples.types, examples.labels)


def checkpoint_weights(network: Positional, weights: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The weights of checkpoints by the names that they have in the wrapped network."""
    names = network.network.state_dict().keys()
    return [{f"network.{name}": value for name, value in each.items() if name in names} for each in weights]


def linear_weights(network: nn.Module) -> list[str]:
    """The names of the weights of linear and convolution layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, kinds)]


def example_gradients(network: Positional, names: Sequence[str]) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    """A function from a batch of :func:`as_tensors` to each example's gradient at some weights, (B, *shape)."""
    parameters = dict(network.named_parameters())
    chosen = {name: parameters.pop(name).detach() for name in names}
    rest = {name: each.detach() for name, each in parameters.items()}

    def loss(weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        *inputs, label = (each[None] for each in row)
        logits = functional_call(network, {**rest, **weights}, tuple(inputs))
        return functional.cross_entropy(logits, label)

    each_loss = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))

    def gradients(batch: list[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = each_loss(chosen, *batch)
        return found

    return gradients
