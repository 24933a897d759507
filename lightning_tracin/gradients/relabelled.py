"""Batches with other labels in the place of their own, or with labels where they have none."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from lightning_tracin.gradients.batches import answers_of, described_batch, labels_of, shallow_copy
from lightning_tracin.gradients.losses import hugging_face_model


def with_labels(batch: Any, labels: Tensor) -> Any:
    """The batch with other labels where :func:`~lightning_tracin.gradients.batches.labels_of` finds its own.

    Where it has none, they become ``labels`` of a mapping, or of the second of two entries where that is a mapping, or
    the second entry beside the only one.

    Raises:
        ValueError: if the form of the batch does not tell where labels belong.
    """
    if isinstance(batch, Mapping):
        return _with_entry(batch, labels)
    if isinstance(batch, Tensor):
        return batch, labels
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return [batch[0], labels] if isinstance(batch, list) else (batch[0], labels)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, second = batch
        if isinstance(second, Tensor) or second is None:
            return _rebuilt(batch, inputs, labels)
        if isinstance(second, Mapping) and (labels_of(second) is not None or labels_of(inputs) is None):
            return _rebuilt(batch, inputs, _with_entry(second, labels))
        if isinstance(inputs, Mapping):
            return _rebuilt(batch, _with_entry(inputs, labels), second)
    raise ValueError(
        f"Where the labels belong cannot be told from a batch of this form: {described_batch(batch)} of "
        f"{len(batch) if isinstance(batch, (tuple, list)) else 'no'} entries. Override influence_with_labels(batch, "
        "labels) to return the batch with these labels in the place of its own."
    )


def relabelled(module: nn.Module, batch: Any, labels: Tensor) -> Any:
    """What :func:`with_labels` does, for the inputs of a model of transformers too.

    Of questions, labels (B, 2) are where the answers start and end. A decoder still reads what it read before: where a
    model would make that of its labels, it is given ``decoder_input_ids`` of the old ones.
    """
    model = hugging_face_model(module)
    if isinstance(batch, Mapping) and asks_questions(model, batch):
        sides = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
        return _with_entries(batch, sides)
    changed = with_labels(batch, labels)
    old = labels_of(batch)
    makes_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if isinstance(changed, Mapping) and old is not None and old.dim() > 1 and not old.is_floating_point():
        reads_labels = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if reads_labels and callable(makes_inputs) and batch.get("decoder_input_ids") is None:
            return _with_entries(changed, {"decoder_input_ids": makes_inputs(labels=old)})
    return changed


def asks_questions(model: nn.Module | None, batch: Any) -> bool:
    """Whether the labels of a batch are where answers start and end in texts."""
    return answers_of(batch) is not None or "QuestionAnswering" in type(model).__name__


def _with_entry(batch: Mapping[str, Any], labels: Tensor) -> Any:
    is_single = not isinstance(batch.get("labels"), Tensor) and isinstance(batch.get("label"), Tensor)
    return _with_entries(batch, {"label" if is_single else "labels": labels})


def _with_entries(batch: Mapping[str, Any], entries: Mapping[str, Any]) -> Any:
    if not isinstance(batch, MutableMapping):
        return {**batch, **entries}
    changed = shallow_copy(batch)
    changed.update(entries)
    return changed


def _rebuilt(batch: Any, first: Any, second: Any) -> Any:
    """A pair of the same type, which may be a named tuple."""
    return type(batch)(first, second) if hasattr(batch, "_fields") else type(batch)((first, second))
