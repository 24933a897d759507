"""Which dimension of a layer's call counts the batch's examples: the first, or the second where time comes first."""

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
        losses: (B,).
        calls: of the layers.
        known: what earlier batches told; what this one tells is added.
        check: whether to check that the first example's loss does not depend on the others.
        always: by one backward pass, needed or not.

    Raises:
        ValueError: if the loss depends on other examples, or no dimension counts examples.
    """
    for call in calls:
        fits = _fitting(losses, call.positions)
        if len(fits) == 1:
            known[call.layer] = fits[0]
    outputs = [call.output for call in calls]
    for example in range(1 if always else len(losses)):  # FSDP allows one backward pass, once for all
        if not (always or check) and all(call.layer in known for call in calls):
            break
        gradients = torch.autograd.grad(losses[example], outputs, retain_graph=True, materialize_grads=True)
        for call, found in zip(calls, gradients, strict=True):
            gradient = features_last(call.layer, found)
            if call.layer not in known:
                time_first = _is_time_first(losses, gradient, example)
                if time_first is not None:
                    known[call.layer] = int(time_first)
            if check:
                owners = examples_of_positions(len(losses), call.positions, known.get(call.layer, 0))
                _require_independent(owners, gradient)
        check = False
    return {call.layer: known.get(call.layer, 0) for call in calls}


def _require_independent(owners: Tensor, of_first: Tensor) -> None:
    """Check where the gradient of the first example's loss, at a call's output, is not zero.

    Raises:
        ValueError: if at other examples: batch norm in training mode, negatives from the batch, a loss over the batch.
    """
    if bool(of_first[owners.to(of_first.device) != 0].nan_to_num(0, 0, 0).any()):  # NaN is named where it is found
        raise ValueError(
            "The loss of the first example depends on the other examples of its batch, so it has no gradient of "
            "its own. Compute each example's loss from that example alone (no statistics over the batch, no "
            "negatives from the batch) in influence_loss."
        )


def _fitting(losses: Tensor, positions: torch.Size) -> list[int]:
    """The dimensions of a layer's call that have the length of the losses: the first, the second (time first), or both.

    Raises:
        ValueError: if neither has.
    """
    shape = tuple(positions)
    fits = [dim for dim, length in enumerate(shape[:2]) if length == len(losses)]
    if not fits:
        raise ValueError(
            f"A layer was called on positions of shape {shape}, of which neither the first nor the second dimension is "
            f"the number of losses, {len(losses)}. Each example needs its own row: rearrange what the layer is called "
            "with, or return one loss for each of its rows."
        )
    return fits


def examples_of_positions(n_examples: int, shape: torch.Size, dim: int) -> Tensor:
    """The example of each position of a layer's call, in the shape of the positions."""
    view = [1] * len(shape)
    view[dim] = n_examples
    return torch.arange(n_examples).view(view).expand(shape)


def _is_time_first(losses: Tensor, of_own: Tensor, example: int) -> bool | None:
    """With as many positions as examples: whether an example's loss moves its own column, not its own row.

    Args:
        losses: (B,).
        of_own: the gradient of the example's loss at the output of a layer's call.
        example: its number.

    Returns:
        None if that cannot be told: it has one word, where its column and its row meet.
    """
    if len(losses) == 1 or losses.stride(0) == 0:  # one mean repeated says nothing of single examples
        return False
    moved = of_own.flatten(2).abs().amax(-1) > 0
    moved[example, example] = False
    in_column = bool(moved[:, example].any())
    moved[:, example] = False
    elsewhere = bool(moved.any())
    return in_column and not elsewhere if in_column or elsewhere else None
