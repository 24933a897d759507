"""What stands for the losses of a batch's examples, and the check that it is one for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

#: From a batch to the losses of its examples, (B,). A mean loss is given as that mean, repeated B times.
Losses: TypeAlias = Callable[[Any], Tensor]


def checked(losses: object) -> Tensor:
    """The losses, if they are one for each example of a batch.

    Raises:
        ValueError: if they are not a float tensor of shape (B,).
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            "influence_loss must return one unreduced loss for each example of the batch, a float tensor of shape "
            f"(B,), but got {got}. Use reduction='none', and average over an example's own tokens or outputs only."
        )
    if len(losses) == 0:
        raise ValueError("influence_loss returned no loss: the batch is empty.")
    return losses
