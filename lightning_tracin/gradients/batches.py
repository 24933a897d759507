"""Batches of any form: their tensors, their labels, and the examples cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def labels_of(batch: Any) -> Tensor | None:
    """The batch's labels, where they can be told: by name in a mapping, the last entry of a pair."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
    else:
        labels = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return labels if isinstance(labels, Tensor) else None


def shallow(batch: Any) -> Any:
    """A batch of the same entries, to be kept, or to be handed to who may take entries out of it."""
    return copy(batch) if isinstance(batch, (Mapping, list)) else batch


def batch_size(batch: Any) -> int | None:
    """The length of the first dimension of the batch's first tensor."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim() > 0), None)


def tensors_of(batch: Any) -> list[Tensor]:
    """The batch's tensors, in their order."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors


def row_of(batch: Any, row: int, size: int) -> Any:
    """The batch of one example; whatever has one entry for each example is cut, the rest is kept."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[row : row + 1] if value.dim() > 0 and len(value) == size else value
        if isinstance(value, Mapping):
            cut_values = {name: cut(each) for name, each in value.items()}
            return cut_values if type(value) is dict else type(value)(cut_values)  # type: ignore[call-arg]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(each) for each in value))
        if isinstance(value, (list, tuple)):
            if len(value) == size and not any(isinstance(each, (Tensor, Mapping, list, tuple)) for each in value):
                return type(value)(value[row : row + 1])
            return type(value)(cut(each) for each in value)
        return value

    return cut(batch)


def described_batch(value: Any) -> str:
    """What a batch, or an output, is, for a message."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {sorted(map(str, value))}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
