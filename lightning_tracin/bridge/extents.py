"""How much examples hold, from which the rows of their gradients are judged before training.

A few examples, chosen because they differ, show how many rows a gradient has; they are no fair sample of the training
set. Some more, spread evenly, show how much an example holds: what goes with the rows of the few is the measure for all
(a ratio estimator: Cochran 1977, "Sampling Techniques", chapter 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

#: Of each part of an example, by its name and "length" or "distinct": how much it holds without padding, and how many
#: different numbers or words.
Extent: TypeAlias = dict[tuple[str, str], int]

_LONGEST = 100_000  # numbers or characters that are counted: more is no text


def extent_of(item: Any) -> Extent:
    """How much an example holds."""
    extent: Extent = {}
    for name, part in _parts(item, ""):
        if isinstance(part, str):
            extent[name, "length"], extent[name, "distinct"] = len(part), len(set(part.split()))
        else:
            trimmed = _without_padding(part)
            extent[name, "length"], extent[name, "distinct"] = len(trimmed), len(np.unique(trimmed))
    return extent


def rows_of_all(rows: Sequence[float], few: Sequence[Extent], others: Sequence[Extent]) -> list[float]:
    """The rows of other examples' gradients, judged by those of a few.

    Args:
        rows: of the few, at least one.
        few: how much these hold.
        others: how much the others hold, at least one.

    Returns:
        The rows of each of the others.
    """
    of_few, counts = np.ones(len(rows)), np.array(rows, dtype=np.float64)
    of_others, least = np.ones(len(others)), _variation(counts)
    for measure in few[0]:
        if not all(each.get(measure, 0) for each in (*few, *others)):
            continue
        amounts = np.array([each[measure] for each in few], dtype=np.float64)
        if _variation(counts / amounts) < least:
            least, of_few = _variation(counts / amounts), amounts
            of_others = np.array([each[measure] for each in others], dtype=np.float64)
    estimated: list[float] = (of_others * counts.sum() / of_few.sum()).tolist()
    return estimated


def _variation(values: Any) -> float:
    """The coefficient of variation."""
    return float(values.std() / max(values.mean(), 1e-12))


def _parts(item: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The texts and the series of whole numbers in an example, each with its name."""
    if isinstance(item, Mapping):
        named = [(str(key), item[key]) for key in item]
    elif is_dataclass(item):
        named = [(each.name, getattr(item, each.name)) for each in fields(item)]
    elif isinstance(item, (list, tuple)) and not (item and isinstance(item[0], (int, float))):
        named = [(str(place), each) for place, each in enumerate(item)]
    else:
        named = []
        part = item if isinstance(item, str) else _whole_numbers(item)
        if part is not None and 0 < len(part) <= _LONGEST:
            yield name, part
    for key, value in named:
        yield from _parts(value, f"{name}.{key}")


def _whole_numbers(item: Any) -> Any:
    """Whole numbers in a row, as an array; None if an item is none."""
    if isinstance(item, Tensor) and not item.is_floating_point():
        item = item.detach().cpu().numpy()
    if isinstance(item, (list, tuple)):
        item = np.array(item)
    return item.reshape(-1) if isinstance(item, np.ndarray) and item.dtype.kind in "iu" else None


def _without_padding(numbers: Any) -> Any:
    """A series without the runs of one number at its ends."""
    changes = np.flatnonzero(np.diff(numbers))
    if not len(changes):
        return numbers[:1]
    return numbers[changes[0] : changes[-1] + 2]
