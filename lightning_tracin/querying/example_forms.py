"""What an example looks like before it is collated: its text, its labels, and whether it is like another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tracin.gradients.batches import IGNORED
from lightning_tracin.results.reader import RawText

#: The names of labels in an example, and of its token ids.
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
IDS = "input_ids"


def text_of(row: Any) -> RawText | None:
    """What an example says, if it is a text, a pair of texts, or a row with one or with one named "text"; else None."""
    if isinstance(row, str) or is_pair(row):
        return row  # type: ignore[no-any-return]
    columns = text_columns(row)
    if "text" in columns:
        return str(row["text"])
    return str(row[columns[0]]) if len(columns) == 1 else None


def text_columns(row: Any) -> list[str]:
    """The names of what a row has in texts, but for its label; of anything else none."""
    if not isinstance(row, Mapping):
        return []
    return [name for name, value in row.items() if isinstance(value, str) and name not in LABELS]


def is_pair(row: Any) -> bool:
    """Whether an example is a pair of texts."""
    return isinstance(row, tuple) and len(row) == 2 and all(isinstance(each, str) for each in row)


def has_label(row: Any) -> bool:
    """Whether an example is a row with a label."""
    return isinstance(row, Mapping) and any(row.get(name) is not None for name in LABELS)


def is_alike(row: Any, like: Any) -> bool:
    """Whether an example has all that another has, in as many dimensions, but for labels by name."""
    if isinstance(like, Mapping):
        names = [name for name in like if name not in LABELS]
        return isinstance(row, Mapping) and all(name in row and is_alike(row[name], like[name]) for name in names)
    if isinstance(like, (tuple, list)) and not _is_numbers(like):
        same = isinstance(row, (tuple, list)) and len(row) == len(like)
        return same and all(is_alike(one, other) for one, other in zip(row, like, strict=True))
    return _dimensions(row) == _dimensions(like)


def _is_numbers(value: Any) -> bool:
    return all(isinstance(each, (int, float)) for each in value)


def _dimensions(value: Any) -> int | str:
    """In how many dimensions a value has numbers; otherwise its kind."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.ndim
    if isinstance(value, (tuple, list)) and _is_numbers(value):
        return 1
    return 0 if isinstance(value, (int, float)) else type(value).__name__


def typed(value: Any, like: Any) -> Any:
    """A number, or numbers, in the type of another value: a tensor, an array, floats; in a column if that has one."""
    if isinstance(value, str):
        return value
    if _dimensions(value) == 0 and _dimensions(like) == 1 and len(like) == 1:
        return typed([value], like)
    if isinstance(like, Tensor):
        return torch.as_tensor(value, dtype=like.dtype)
    if isinstance(like, (np.ndarray, np.generic)):
        return np.asarray(value, dtype=like.dtype)
    if isinstance(value, list) and _is_of_alike(like):
        return [typed(each, like[0]) for each in value]
    return type(like)(value) if isinstance(like, (float, bool)) and isinstance(value, (int, float)) else value


def _is_of_alike(like: Any) -> bool:
    """Whether a list or tuple tells the type of each of its numbers: one in a column, or floats."""
    return isinstance(like, (list, tuple)) and len(like) > 0 and (len(like) == 1 or isinstance(like[0], float))


def are_own_labels(items: Sequence[Any], name: str) -> bool:
    """Whether training's labels are the token ids themselves, as a language model's are; padding may have none.

    Args:
        items: some training examples.
        name: of the labels in them.
    """
    return bool(items) and all(_has_own_labels(item, name) for item in items)


def _has_own_labels(item: Any, name: str) -> bool:
    if not isinstance(item, Mapping) or not {name, IDS} <= item.keys() or _dimensions(item[name]) != 1:
        return False
    labels, ids, mask = _integers(item[name]), _integers(item[IDS]), _mask_of(item)
    same = len(labels) == len(ids) == len(mask)
    return same and all(
        label == token or (label == IGNORED and not read) for label, token, read in zip(labels, ids, mask, strict=True)
    )


def own_labels(item: Mapping[str, Any], items: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The token ids of an example as its labels, in the type of training's; padding has none where training's has none.

    Args:
        item: the example.
        items: some training examples.
        name: of the labels in them.
    """
    without = any(IGNORED in _integers(each[name]) for each in items)
    ids = [
        IGNORED if without and not read else token
        for token, read in zip(_integers(item[IDS]), _mask_of(item), strict=True)
    ]
    return typed(ids, items[0][name])


def _mask_of(item: Mapping[str, Any]) -> list[int]:
    """1 at an example's tokens, and 0 at its padding."""
    mask = item.get("attention_mask")
    return [1] * len(item[IDS]) if mask is None else _integers(mask)


def _integers(values: Any) -> list[int]:
    return list(map(int, values))


def lent(like: Mapping[str, Any], name: str, item: Mapping[str, Any]) -> Any:
    """A label for the collate function: that of a training example; of tokens, one for each, without a loss."""
    label = like[name]
    of_tokens = _dimensions(label) == 1 and IDS in like and len(label) == len(like[IDS])
    return typed([IGNORED] * len(item[IDS]), label) if of_tokens else label


def described(item: Any) -> str:
    """An example, in words for an error message."""
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with {', '.join(map(str, item))}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)} ({', '.join(type(each).__name__ for each in item[:4])})"
    if isinstance(item, (Tensor, np.ndarray)):
        return f"a {type(item).__name__} of shape {tuple(item.shape)}"
    return f"a {type(item).__name__}"
