"""Buffers for rows that wait to be written: small blocks are copied into memory that is allocated once and reused.

Without them, thousands of small tensors would be allocated between those that a training step allocates and frees. The
gaps could not hold larger tensors, and the process's memory would grow with the training set (heap fragmentation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged


class GrowableTensor:
    """A tensor to which rows are appended; its memory doubles when it is full."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._length = 0

    def add(self, rows: Tensor) -> None:
        """Append a copy of some rows."""
        length = self._length + len(rows)
        if self._memory is None or length > len(self._memory):
            memory = rows.new_empty(max(length, 2 * self._length), *rows.shape[1:])
            if self._memory is not None:
                memory[: self._length] = self.rows
            self._memory = memory
        self._memory[self._length : length] = rows
        self._length = length

    @property
    def rows(self) -> Tensor:
        """All rows since the last :meth:`clear`; a view of the buffer, which the next rows overwrite after that."""
        return torch.empty(0) if self._memory is None else self._memory[: self._length]

    def clear(self) -> None:
        """Remove all rows; their memory is reused."""
        self._length = 0


class RowBuffer:
    """Blocks of one kind, concatenated as they are added."""

    def __init__(self) -> None:
        self.n_examples = 0
        self._kind: Any = None
        self._columns: dict[str, GrowableTensor] = {}

    @property
    def nbytes(self) -> int:
        """The number of bytes in the buffer."""
        return sum(column.rows.nbytes for column in self._columns.values())

    def add(self, block: Ragged) -> None:
        """Append a copy of a block; its examples are numbered after those in the buffer."""
        self._kind = type(block)
        for name, column in block.columns.items():
            rows = column + self.n_examples if name == "examples" else column
            self._columns.setdefault(name, GrowableTensor()).add(rows)
        self.n_examples += block.n_examples

    def block(self) -> Any:
        """The blocks as one, with examples in the order in which they were added; a view of the buffer."""
        return self._kind(self.n_examples, **{name: column.rows for name, column in self._columns.items()})

    def clear(self) -> None:
        """Remove all blocks; their memory is reused."""
        self.n_examples = 0
        for column in self._columns.values():
            column.clear()
