"""The check that an example's loss does not depend on the other examples of its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_tracin.gradients.batches import tensors_of
from lightning_tracin.gradients.losses import DependsOnBatch, Losses, require_one_each
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.precision import full_precision, loss_tolerance

_PARTS = (slice(None), slice(0, None, 2), slice(1, None, 2))  # a whole batch, and two halves of it


@full_precision()
def check_batching(
    module: nn.Module,
    losses: Losses,
    part_of: Callable[[slice], Any],
    indices: Sequence[int],
    batch: Any,
    expected: Tensor,
) -> None:
    """Check that the losses of a few examples do not depend on the other examples of their batch.

    The examples are put together again, once into the same batch and once into two halves, of which one may have less
    padding. If the same batch has other losses than before (the collate function masks words at random, say), the
    check proves nothing and passes.

    Args:
        module: the module, in eval mode.
        losses: the function from a batch to its examples' losses.
        part_of: the function from places in ``indices`` to the batch of those examples, on the module's device.
        indices: the examples' indices.
        batch: the examples' batch.
        expected: (len(indices),) the losses of that batch, on the CPU.

    Raises:
        ValueError: if there is not one loss for each example.
        DependsOnBatch: if an example's loss differs between the batch and its half. If the halves are padded less, or
            only the mean loss is known, there is a warning in its place.
    """
    with torch.no_grad():
        batches = [part_of(part) for part in _PARTS]
        repeated, *losses_of_halves = [losses(each).float().cpu() for each in batches]
    for part, found_losses in zip(_PARTS, (repeated, *losses_of_halves), strict=True):
        require_one_each(len(found_losses), len(indices[part]), "training")
    halved = expected.new_empty(len(indices))
    halved[::2], halved[1::2] = losses_of_halves
    if isinstance(losses, MeanLoss):  # each loss is the mean of its batch
        expected, repeated, halved = (values.mean()[None] for values in (expected, repeated, halved))
    worst = int((halved - expected).abs().argmax())
    tolerance = loss_tolerance(module)
    is_repeatable, is_independent = (
        torch.allclose(values, expected, rtol=tolerance, atol=1e-6) for values in (repeated, halved)
    )
    if is_independent or not is_repeatable:
        return
    name, size = type(module).__name__, len(indices)
    which = "losses are" if isinstance(losses, MeanLoss) else f"the loss of training example {indices[worst]} is"
    found = f"{which} {float(expected[worst]):.4g} in a batch of {size}, but {float(halved[worst]):.4g} in one of half"
    if isinstance(losses, MeanLoss) or _widths(batches[1 + worst % 2]) != _widths(batch):
        rank_zero_warn(
            f"{name} seems to read padding: {found} of them, which is padded less. Scores then depend on how examples "
            "are batched. Mask the padding, or pack it (torch.nn.utils.rnn.pack_padded_sequence)."
        )
        return
    raise DependsOnBatch(
        f"The losses of {name} depend on the batch: {found} of them. Divide an example's loss by what it holds itself "
        "(its tokens, its outputs), never by what its batch does."
    )


def _widths(batch: Any) -> list[torch.Size]:
    """The shapes of a batch's tensors without their first dimension."""
    return [tensor.shape[1:] for tensor in tensors_of(batch)]
