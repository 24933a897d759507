"""A collate function that is watched: each batch that it makes is compared with the examples that it was given.

``collated_order`` looks before training at a few examples that differ; this looks at each batch of our own passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_tracin.gradients.batches import tensors_of


class InOrder:
    """A collate function that fails if it puts the examples of a batch in another order.

    Args:
        collate: the user's own.

    Attributes:
        own: the same.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.own = collate

    def __call__(self, items: Any) -> Any:
        """The batch of some examples.

        Raises:
            ValueError: if each row of it, or of a part of it, is another example's than it should be.
        """
        batch = self.own(items)
        order = collated_order_of(items, batch)
        if order is not None:
            name = getattr(self.own, "__qualname__", type(self.own).__name__)
            raise ValueError(
                f"The collate function, {name}, puts the examples of a batch in another order than they come in, so "
                f"that they cannot be numbered: of {len(order)} examples, number {order[0]} came first. Let it leave "
                "them in their order. Or sort them inside the model, and undo it there."
            )
        return batch


def collated_order_of(items: Any, batch: Any) -> list[int] | None:
    """The order in which a batch has some examples, where it is certain that it is not their own; else None.

    An example is found in a row by the most numbers that it holds together, such as its token ids, at the row's start
    or end. What a collate function makes of texts, or masks at random, is not found, and so proves nothing.
    """
    if not isinstance(items, Sequence) or len(items) < 2:
        return None
    wanted = [_most_numbers(item) for item in items]
    if any(len(each) < 2 for each in wanted):
        return None
    orders = []
    for part in tensors_of(batch):
        if part.dim() < 2 or len(part) != len(items):
            continue
        rows = list(part.flatten(1))
        if all(_holds(row, numbers) for row, numbers in zip(rows, wanted, strict=True)):
            return None
        found = [[place for place, numbers in enumerate(wanted) if _holds(row, numbers)] for row in rows]
        if all(len(each) == 1 for each in found):
            order = [place for (place,) in found]
            if len(set(order)) == len(order):
                orders.append(order)
    return orders[0] if orders else None


def _holds(row: Tensor, numbers: Tensor) -> bool:
    """Whether a row begins, or ends, with some numbers."""
    size = len(numbers)
    if size > len(row):
        return False
    numbers = numbers.to(row.dtype)
    return torch.equal(row[:size], numbers) or torch.equal(row[len(row) - size :], numbers)


def _most_numbers(item: Any) -> Tensor:
    """The largest tensor, or list of numbers, in an example, in one dimension."""
    if isinstance(item, Tensor):
        return item.flatten()
    if isinstance(item, np.ndarray) and item.dtype.kind in "iufb":
        return torch.from_numpy(np.ascontiguousarray(item)).flatten()
    if isinstance(item, Mapping):
        parts: list[Any] = list(item.values())
    elif is_dataclass(item):
        parts = [getattr(item, each.name) for each in fields(item)]
    elif isinstance(item, (list, tuple)):
        if item and all(isinstance(each, (int, float)) for each in item):
            return torch.tensor(item)
        parts = list(item)
    else:
        return torch.empty(0)
    return max(map(_most_numbers, parts), key=len, default=torch.empty(0))
