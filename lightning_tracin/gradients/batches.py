"""Batches of any form: their size, tensors and labels, and batches of one example cut out of them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from copy import copy
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

#: The label by which transformers, and torch's cross-entropy, mark a position without a loss.
IGNORED = -100


def labels_of(batch: Any) -> Tensor | None:
    """The batch's labels, as far as its form alone tells them; None if it does not.

    They are ``labels`` or ``label`` of a mapping, or the second of two entries, either of which may be such a mapping.
    What stands where among more entries (labels, lengths, masks) is anyone's guess.
    """
    if isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            return None
        inputs, labels = batch
        if isinstance(labels, Tensor):
            return labels
        found = _named_labels(labels)
        return _named_labels(inputs) if found is None else found
    return _named_labels(batch)


def _named_labels(batch: Any) -> Tensor | None:
    """``labels`` or ``label`` of a mapping."""
    named = [batch.get(name) for name in ("labels", "label")] if isinstance(batch, Mapping) else []
    return next((each for each in named if isinstance(each, Tensor)), None)


def counts_of(labels: Tensor | None) -> list[int] | None:
    """How many labels each example of a batch has; None where they are not whole numbers by their type.

    Args:
        labels: (B, ...), :data:`IGNORED` where there is none; None if there are none.
    """
    if labels is None or labels.dim() == 0 or labels.is_floating_point() or labels.is_complex():
        return None
    counts: list[int] = (labels != IGNORED).reshape(len(labels), -1).sum(1).cpu().tolist()
    return counts


def answers_of(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Where the answers of a batch of questions start and end in their texts, (B,) each; None if it has none."""
    named = [batch.get(f"{side}_positions") for side in ("start", "end")] if isinstance(batch, Mapping) else []
    positions = [each.flatten(1).squeeze(1) if each.dim() > 1 else each for each in named if isinstance(each, Tensor)]
    return (positions[0], positions[1]) if len(positions) == 2 else None


def shown_labels_of(batch: Any) -> Tensor | None:
    """The labels to show beside a batch's examples: its labels, or where the answers start."""
    labels, answers = labels_of(batch), answers_of(batch)
    return answers[0] if labels is None and answers is not None else labels


def shallow_copy(batch: Any) -> Any:
    """A copy of a batch's mappings and lists, at every level, so that entries removed from it stay in the original.

    Tensors are shared.
    """
    if isinstance(batch, list):
        return _refilled(batch, [shallow_copy(each) for each in batch])
    if isinstance(batch, tuple):
        parts = [shallow_copy(each) for each in batch]
        if all(part is each for part, each in zip(parts, batch, strict=True)):
            return batch
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if not isinstance(batch, Mapping):
        return batch
    copied = copy(batch)
    for name, value in batch.items():
        part = shallow_copy(value)
        if part is not value and isinstance(copied, MutableMapping):
            copied[name] = part
    return copied


def _refilled(batch: list[Any], parts: list[Any]) -> list[Any]:
    """A copy of a list, of its own kind, with other entries."""
    copied = copy(batch)
    copied[:] = parts
    return copied


def batch_size(batch: Any) -> int | None:
    """The length of the first dimension of the batch's first tensor."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim() > 0), None)


def tensors_of(batch: Any) -> list[Tensor]:
    """The batch's tensors, in their order."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors


def row_of(batch: Any, row: int, size: int) -> Any:
    """The batch of one example, by its place; see :func:`rows_of`."""
    return rows_of(batch, slice(row, row + 1), size)


def rows_of(batch: Any, rows: slice, size: int) -> Any:
    """The batch of some examples: entries by example are cut to those examples, others stay as they are.

    Args:
        batch: a tensor, mapping, sequence or named tuple, nested to any depth.
        rows: the examples' places in the batch.
        size: number of examples in the batch.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.dim() > 0 and len(value) == size else value
        if isinstance(value, Mapping):
            cut_values = {name: cut(each) for name, each in value.items()}
            return cut_values if type(value) is dict else type(value)(cut_values)  # type: ignore[call-arg]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(each) for each in value))
        if isinstance(value, (list, tuple)):
            if len(value) == size and not any(isinstance(each, (Tensor, Mapping, list, tuple)) for each in value):
                return type(value)(value[rows])
            return type(value)(cut(each) for each in value)
        return value

    return cut(batch)


def described_batch(value: Any) -> str:
    """The form of a batch or of a module's output, in words for an error message."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {sorted(map(str, value))}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
