"""Blocks of examples with any number of rows each: the base classes of gradients and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_tracin.gradients.rows import DTYPES, Dtype, rows_in_bytes

_Block = TypeVar("_Block", bound="Ragged")
_Directed = TypeVar("_Directed", bound="DirectedRows")


@dataclass(frozen=True)
class Ragged:
    """A block of examples, in coordinate format: ``examples`` says which example each row belongs to.

    A subclass adds columns: tensors with one entry for each row or, if ``PER_EXAMPLE`` names them, for each example. A
    column that a block does not need may be None.

    Attributes:
        KIND: name of this kind of block on disk.
        SORTED_BY: columns that come before ``examples`` in the order of the rows.
        PER_EXAMPLE: columns with one float for each example; NaN marks a missing value.
        n_examples: number of examples in this block.
        examples: (R,) int64, the example of each row, counted from 0 inside the block.
    """

    KIND: ClassVar[str]
    SORTED_BY: ClassVar[tuple[str, ...]] = ()
    PER_EXAMPLE: ClassVar[frozenset[str]] = frozenset()

    n_examples: int
    examples: Tensor

    @property
    def columns(self) -> dict[str, Tensor]:
        """The block's tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of numbers in a row of each column that has several."""
        return tuple(column.shape[1] for column in self.columns.values() if column.dim() == 2)

    @classmethod
    def cat(cls: type[_Block], blocks: Sequence[_Block]) -> _Block:
        """Concatenate blocks into new memory; examples are renumbered and rows sorted."""
        n_examples = sum(block.n_examples for block in blocks)
        offsets = torch.tensor([0, *(block.n_examples for block in blocks)]).cumsum(0).tolist()
        examples = [block.examples + offset for block, offset in zip(blocks, offsets, strict=False)]
        sorted_by = [torch.cat([getattr(block, name) for block in blocks]) for name in cls.SORTED_BY]
        places = _places_when_sorted(_sort_keys(sorted_by, torch.cat(examples), n_examples))
        columns: dict[str, Any] = {"examples": _concatenated(examples, places)}
        for name in blocks[0].columns.keys() - {"examples"}:
            pieces = [getattr(block, name) for block in blocks]
            columns[name] = torch.cat(pieces) if name in cls.PER_EXAMPLE else _concatenated(pieces, places)
        return cls(n_examples=n_examples, **columns)

    def select(self: _Block, rows: Tensor | slice) -> _Block:
        """The block with only the given rows.

        Args:
            rows: a boolean mask (R,), row numbers, or a slice, which copies nothing.
        """
        columns: dict[str, Any] = {
            name: column[rows] for name, column in self.columns.items() if name not in self.PER_EXAMPLE
        }
        return replace(self, **columns)

    def sorted(self: _Block) -> _Block:
        """The block with its rows sorted; the block itself if they are, so that stored rows stay memory-mapped."""
        keys = _sort_keys([getattr(self, name) for name in self.SORTED_BY], self.examples, self.n_examples)
        return self if _is_ascending(keys) else self.select(torch.argsort(keys, stable=True))

    def slice(self: _Block, start: int, stop: int) -> _Block:
        """The examples from ``start`` to ``stop`` (exclusive), renumbered from 0."""
        if (start, stop) == (0, self.n_examples):
            return self
        block = self.select((self.examples >= start) & (self.examples < stop))
        per_example: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in self.PER_EXAMPLE}
        return replace(block, n_examples=stop - start, examples=block.examples - start, **per_example)

    def arranged(self: _Block, places: Tensor, n_examples: int) -> _Block:
        """The block with its examples renumbered and its rows sorted.

        Args:
            places: (self.n_examples,) the new number of each example; -1 leaves an example out.
            n_examples: number of examples in the new block; those that no place names have no rows.
        """
        return self.moved(places, n_examples).sorted()

    def moved(self: _Block, places: Tensor, n_examples: int) -> _Block:
        """As :meth:`arranged`, but rows are not sorted, and not copied unless an example is left out."""
        examples = places[self.examples]
        is_placed = examples >= 0
        block = self if bool(is_placed.all()) else self.select(is_placed)
        per_example: dict[str, Any] = {}
        for name in self.PER_EXAMPLE:
            values = getattr(self, name)
            per_example[name] = values.new_full((n_examples,), torch.nan)
            per_example[name][places[places >= 0]] = values[places >= 0]
        return replace(block, n_examples=n_examples, examples=examples[is_placed], **per_example)

    def to(self: _Block, device: torch.device) -> _Block:
        """The same block with its tensors on a device."""
        moved: dict[str, Any] = {name: column.to(device) for name, column in self.columns.items()}
        return replace(self, **moved)

    def as_dtype(self: _Block, dtype: Dtype) -> _Block:
        """The block as it is stored: with directions, if it has any, in another type."""
        return self

    def rows_by_example(self) -> Tensor:
        """(n_examples,) int64, the number of rows of each example."""
        return torch.bincount(self.examples, minlength=self.n_examples)


@dataclass(frozen=True)
class DirectedRows(Ragged):
    """Rows of gradients, each as a direction and a norm.

    Attributes:
        norms: (R,) float32, Euclidean norm of each row.
        directions: (R, H) float32, float16 or int8, each row a positive multiple of the gradient.
        lengths: (R,) float32, Euclidean norm of each direction; None if all are 1.
    """

    norms: Tensor
    directions: Tensor
    lengths: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """(R,) the factor that turns each direction into the gradient."""
        return self.norms if self.lengths is None else self.norms / self.lengths

    def as_dtype(self: _Directed, dtype: Dtype) -> _Directed:
        """The same rows with directions in another type; "int8" scales each direction by its largest entry."""
        if dtype != "int8":
            return replace(self, directions=self.directions.to(DTYPES[dtype]))
        directions, lengths = rows_in_bytes(self.directions)
        return replace(self, directions=directions, lengths=lengths)

    def scaled(self: _Directed, factors: Tensor) -> _Directed:
        """Every example's gradient multiplied by its own factor, from ``factors`` (n_examples,)."""
        return replace(self, norms=self.norms * factors[self.examples])

    def example_norms(self) -> Tensor:
        """(n_examples,) float32, the norm of each example's gradient over all of its rows."""
        largest = torch.zeros(self.n_examples, dtype=torch.float32).scatter_reduce(0, self.examples, self.norms, "amax")
        safe = torch.where(largest > 0, largest, 1.0)  # in float32, the squares of norms under 1e-19 underflow
        squares = torch.zeros(self.n_examples, dtype=torch.float32).index_add_(
            0, self.examples, (self.norms / safe[self.examples]) ** 2
        )
        return largest * squares.sqrt()


def _sort_keys(columns: Sequence[Tensor], examples: Tensor, n_examples: int) -> Tensor:
    """(R,) int64 keys that order rows by a column first, if there is one, and then by example."""
    return columns[0] * max(n_examples, 1) + examples if columns else examples


def _places_when_sorted(keys: Tensor) -> Tensor | None:
    """(R,) the place of each row in sorted order; None if the rows are sorted already."""
    if _is_ascending(keys):
        return None
    order = torch.argsort(keys, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places


def _concatenated(pieces: Sequence[Tensor], places: Tensor | None) -> Tensor:
    """One column from its pieces, with each row at its place.

    Every row is copied only once, because a block that is about to be written may take much of the memory.
    """
    if places is None:
        return torch.cat(list(pieces))
    column = pieces[0].new_empty(len(places), *pieces[0].shape[1:])
    start = 0
    for piece in pieces:
        column[places[start : start + len(piece)]] = piece
        start += len(piece)
    return column


def _is_ascending(keys: Tensor) -> bool:
    return bool((keys[1:] >= keys[:-1]).all())
