"""The dimension of a layer's call that counts the batch's examples: the first, or the second if time comes first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.calls import Call
from lightning_tracin.gradients.linear_layers import features_last


def detect_example_dims(
    losses: Tensor, calls: Sequence[Call], known: dict[nn.Module, int], *, check: bool, always: bool = False
) -> dict[nn.Module, int]:
    """For each layer, the dimension of its calls in a batch that counts the examples.

    Args:
        losses: (B,) the losses of the batch's examples, with their graph.
        calls: the calls of the layers.
        known: the dimensions that earlier batches determined; those that this batch determines are added.
        check: whether to check that the first example's loss does not depend on other examples.
        always: whether to run exactly one backward pass, also if none is needed, as FSDP requires.

    Returns:
        The dimension for every layer: 0, or 1 (time first); 0 as long as no batch determined it.

    Raises:
        ValueError: if the loss depends on other examples, or no dimension has the number of the losses.
    """
    for call in calls:
        candidates = _matching_dims(losses, call.positions)
        if len(candidates) == 1:
            known[call.layer] = candidates[0]
    outputs = [call.output for call in calls]
    for example in range(1 if always else len(losses)):  # FSDP allows only one backward pass
        if not (always or check) and all(call.layer in known for call in calls):
            break
        gradients = torch.autograd.grad(losses[example], outputs, retain_graph=True, materialize_grads=True)
        for call, output_gradient in zip(calls, gradients, strict=True):
            gradient = features_last(call.layer, output_gradient)
            if call.layer not in known:
                time_first = _is_time_first(losses, gradient, example)
                if time_first is not None:
                    known[call.layer] = int(time_first)
            if check:
                owners = examples_of_positions(len(losses), call.positions, known.get(call.layer, 0))
                _require_independent(owners, gradient)
        check = False
    return {call.layer: known.get(call.layer, 0) for call in calls}


def examples_of_positions(n_examples: int, shape: torch.Size, dim: int) -> Tensor:
    """The example of each position of a layer's call.

    Args:
        n_examples: number of examples in the batch.
        shape: the shape of the positions.
        dim: the dimension of the positions that counts the examples.

    Returns:
        int64 tensor of the given shape.
    """
    view = [1] * len(shape)
    view[dim] = n_examples
    return torch.arange(n_examples).view(view).expand(shape)


def _matching_dims(losses: Tensor, positions: torch.Size) -> list[int]:
    """The dimensions of a layer's call, among its first two, that are as long as the losses.

    Raises:
        ValueError: if neither is.
    """
    shape = tuple(positions)
    dims = [dim for dim, length in enumerate(shape[:2]) if length == len(losses)]
    if not dims:
        raise ValueError(
            f"A layer was called on positions of shape {shape}, of which neither the first nor the second dimension is "
            f"the number of losses, {len(losses)}. Each example needs its own row: rearrange what the layer is called "
            "with, or return one loss for each of its rows."
        )
    return dims


def _require_independent(owners: Tensor, gradient: Tensor) -> None:
    """Check that the first example's loss has no gradient at positions of other examples.

    It has one with statistics over the batch, negatives from the batch, or a loss over the whole batch.

    Args:
        owners: the example of each position of a call.
        gradient: the gradient of the first example's loss at the call's output, features last.

    Raises:
        ValueError: if the gradient is not zero at another example.
    """
    # The training pass reports NaN gradients, by the example that has them.
    if bool(gradient[owners.to(gradient.device) != 0].nan_to_num(0, 0, 0).any()):
        raise ValueError(
            "The loss of the first example depends on the other examples of its batch, so it has no gradient of "
            "its own. Compute each example's loss from that example alone (no statistics over the batch, no "
            "negatives from the batch) in influence_loss."
        )


def _is_time_first(losses: Tensor, gradient: Tensor, example: int) -> bool | None:
    """Whether time comes first in a call on B times B positions, by the positions that an example's loss depends on.

    With time first, an example is a column of the positions; otherwise it is a row.

    Args:
        losses: (B,) the losses; the repeated mean of a batch cannot show it, and counts as examples first.
        gradient: (B, B, ...) the gradient of one example's loss at the call's output.
        example: the example's place in the batch.

    Returns:
        None if the loss depends at most on the position where the example's column and row cross.
    """
    if len(losses) == 1 or losses.stride(0) == 0:  # a stride of 0: one mean loss, expanded
        return False
    is_reached = gradient.flatten(2).abs().amax(-1) > 0
    is_reached[example, example] = False
    in_column = bool(is_reached[:, example].any())
    is_reached[:, example] = False
    elsewhere = bool(is_reached.any())
    return in_column and not elsewhere if in_column or elsewhere else None
