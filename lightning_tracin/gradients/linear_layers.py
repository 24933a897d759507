"""Layers that are linear in their weight, and the two factors of the weight's gradient at each of their calls.

A convolution is a linear layer on its unfolded windows. In a grouped convolution, each group of a window counts as a
position of its own, whose gradient at the output is zero outside of the group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LINEAR_LAYERS = "nn.Linear, nn.Conv1d, nn.Conv2d or transformers' Conv1D"


def is_linear(layer: nn.Module) -> bool:
    """Whether the weight's gradient at a layer can be given by two factors for each position."""
    return _kind_of(layer) is not None


def require_linear(layer: nn.Module, value: Tensor, output: Tensor) -> None:
    """Check that a linear layer of a kind of its own, or with a forward hook, computes what its base class computes.

    Raises:
        ValueError: if its output is another, so that its weight's gradient has other factors than these.
    """
    kind, weight = _kind_of(layer), getattr(layer, "weight", None)
    if kind is None or not isinstance(weight, Tensor) or not weight.is_floating_point():  # as quantized ones
        return
    if type(layer).forward is kind.forward and all(map(is_ours, layer._forward_hooks.values())):
        return
    with torch.no_grad():
        plain = kind.forward(layer, value)
    same_shape = plain.shape == output.shape
    # Fits in 8 bits are nearly that far from it; of what is not finite others tell.
    if same_shape and not float((output.detach() - plain).norm()) > 0.1 * float(plain.norm()):
        return
    how = "other numbers" if same_shape else f"{tuple(output.shape)} instead of {tuple(plain.shape)}"
    name = kind.__name__
    raise ValueError(
        f"{type(layer).__name__} is a {name} by its class, but its own forward, or a forward hook, returns {how}: the "
        f"gradient of its weight is not that of a {name}. Name layers that are plain in the methods of TracInCallback, "
        "or return a plain one from influence_last_layer."
    )


def _kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The class by which a layer is linear; None if it is not."""
    if _is_transposed(layer):
        return type(layer)
    return next((each for each in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(layer, each)), None)


def is_ours(hook: Any) -> bool:
    """Whether a hook of a layer is one of this package's, which changes nothing."""
    return str(getattr(hook, "__module__", "")).startswith("lightning_tracin.")


def features_last(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's output, or the gradient there, with the features in the last dimension and positions before it."""
    return output.movedim(1, -1) if _is_convolution(layer) and output.dim() > 2 else output


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or a tensor of its shape, as a matrix (out, in) in the order of the factors."""
    if _is_transposed(layer):
        return weight.T
    return weight.flatten(1) if weight.dim() > 2 else weight


def factors_of_call(layer: nn.Module, value: Tensor, delta: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two factors at every position of a call.

    Args:
        layer: a linear layer.
        value: the input of the call.
        delta: the gradient at the output, features last.
        owners: the example of each position, in the shape of ``delta`` without its last dimension.

    Returns:
        The example (P,), the input (P, in), with a 1 appended if the layer has a bias, and the gradient (P, out).
    """
    owners, deltas = owners.reshape(-1), delta.reshape(-1, delta.shape[-1])
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        windows = _windows(layer, value)  # (P, groups, in / groups * kernel)
        if layer.groups > 1:
            n_out = deltas.shape[1] // layer.groups
            group_mask = torch.eye(layer.groups).repeat_interleave(n_out, dim=1).to(deltas)  # (groups, out)
            deltas = (deltas[:, None] * group_mask).reshape(-1, deltas.shape[1])
            owners = owners.repeat_interleave(layer.groups)
        inputs = windows.reshape(-1, windows.shape[-1])
    else:
        inputs = value.reshape(-1, value.shape[-1])
    if has_bias(layer):
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    return owners, inputs, deltas


def has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias, so that its inputs have a 1 appended."""
    return getattr(layer, "bias", None) is not None


def _windows(layer: nn.Conv1d | nn.Conv2d, value: Tensor) -> Tensor:
    """The unfolded windows of a convolution, (positions, groups, in / groups * kernel), example by example."""
    values = value if isinstance(layer, nn.Conv2d) else value[:, :, None]
    kernel, stride, dilation = (_pair(layer, getattr(layer, name)) for name in ("kernel_size", "stride", "dilation"))
    margins = _margins(layer, kernel, dilation)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(margins):
        # torch pads by reflection only with as many spatial dimensions as margins.
        one_row = isinstance(layer, nn.Conv1d) and mode != "constant"
        values = (
            functional.pad(values[:, :, 0], margins[:2], mode)[:, :, None]
            if one_row
            else functional.pad(values, margins, mode)
        )
    unfolded = functional.unfold(values, kernel, dilation=dilation, stride=stride)  # (B, in * kernel, positions)
    return unfolded.transpose(1, 2).reshape(-1, layer.groups, unfolded.shape[1] // layer.groups)


def _margins(layer: nn.Conv1d | nn.Conv2d, kernel: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """The padding of each side: left, right, top, bottom."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    margins: list[int] = []
    for dim in (1, 0):
        if layer.padding == "same":
            total = dilation[dim] * (kernel[dim] - 1)
            margins += [total // 2, total - total // 2]
        else:
            padding: Any = layer.padding
            size = padding[0] if isinstance(layer, nn.Conv1d) else padding[dim]
            margins += [size, size] if dim == 1 or isinstance(layer, nn.Conv2d) else [0, 0]
    return margins


def _pair(layer: nn.Module, sizes: tuple[int, ...]) -> tuple[int, int]:
    """A convolution's sizes in two dimensions; a convolution over a sequence has a height of 1."""
    return (1, sizes[0]) if isinstance(layer, nn.Conv1d) else (sizes[0], sizes[1])


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Conv1d, nn.Conv2d))


def _is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, whose weight is (in, out); by name, without importing transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
