"""What waits to be written: rows that come in small blocks, and lie in memory that is allotted once and used again.

Kept each for itself, thousands of small tensors would lie between those that a training step makes and frees, and what
these leave free could not hold anything larger: the process would grow with the training set (heap fragmentation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged


class GrowableTensor:
    """A tensor that rows are added to; where they do not fit, its memory is doubled."""

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._length = 0

    def add(self, rows: Tensor) -> None:
        """Copy rows behind those that are there."""
        length = self._length + len(rows)
        if self._held is None or length > len(self._held):
            held = rows.new_empty(max(length, 2 * self._length), *rows.shape[1:])
            if self._held is not None:
                held[: self._length] = self.rows
            self._held = held
        self._held[self._length : length] = rows
        self._length = length

    @property
    def rows(self) -> Tensor:
        """All that was added since the last :meth:`clear`: not a copy."""
        return torch.empty(0) if self._held is None else self._held[: self._length]

    def clear(self) -> None:
        """Forget the rows, and keep their memory."""
        self._length = 0


class RowBuffer:
    """Blocks of one kind, joined as they come."""

    def __init__(self) -> None:
        self.n_examples = 0
        self._kind: Any = None
        self._columns: dict[str, GrowableTensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        return sum(column.rows.nbytes for column in self._columns.values())

    def add(self, block: Ragged) -> None:
        """Copy a block behind those that wait; its examples are counted on."""
        self._kind = type(block)
        for name, column in vars(block).items():
            if isinstance(column, Tensor):
                rows = column + self.n_examples if name == "examples" else column
                self._columns.setdefault(name, GrowableTensor()).add(rows)
        self.n_examples += block.n_examples

    def block(self) -> Any:
        """All that waits as one block, example by example as they came: not a copy."""
        return self._kind(self.n_examples, **{name: column.rows for name, column in self._columns.items()})

    def clear(self) -> None:
        """Forget what waits, and keep its memory."""
        self.n_examples = 0
        for column in self._columns.values():
            column.clear()
