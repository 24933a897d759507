"""The check that an example's loss does not depend on which others are in its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_tracin.gradients.batches import tensors_of
from lightning_tracin.gradients.losses import is_half
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.precision import full_precision


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
