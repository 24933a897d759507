"""Blocks of examples that have any number of rows each: what all gradients and texts in memory are made of."""

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
    """A block of examples; each owns the rows whose entry in ``examples`` is its number.

    A subclass adds columns: tensors with an entry for each row or, where ``PER_EXAMPLE`` names them, for each example.
    A column may be None where a block does without it.

    Attributes:
        KIND: what a block is called on disk.
        SORTED_BY: columns that rows are sorted by before they are sorted by example.
        PER_EXAMPLE: columns with one float entry for each example; NaN stands for none.
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

    @classmethod
    def cat(cls: type[_Block], blocks: Sequence[_Block]) -> _Block:
        """Join blocks one after the other into new memory; examples are renumbered, and rows are sorted."""
        n_examples = sum(block.n_examples for block in blocks)
        first = torch.tensor([0, *(block.n_examples for block in blocks)]).cumsum(0).tolist()
        numbered = [block.examples + start for block, start in zip(blocks, first, strict=False)]
        sorted_by = [torch.cat([getattr(block, name) for block in blocks]) for name in cls.SORTED_BY]
        places = _places_when_sorted(_sort_keys(sorted_by, torch.cat(numbered), n_examples))
        joined: dict[str, Any] = {"examples": _joined(numbered, places)}
        for name in blocks[0].columns.keys() - {"examples"}:
            parts = [getattr(block, name) for block in blocks]
            joined[name] = torch.cat(parts) if name in cls.PER_EXAMPLE else _joined(parts, places)
        return cls(n_examples=n_examples, **joined)

    def select(self: _Block, rows: Tensor | slice) -> _Block:
        """Only the given rows: a boolean mask (R,), row numbers, or a slice, which copies nothing."""
        chosen: dict[str, Any] = {
            name: column[rows] for name, column in self.columns.items() if name not in self.PER_EXAMPLE
        }
        return replace(self, **chosen)

    def sorted(self: _Block) -> _Block:
        """The block with its rows sorted; the same block where they are, so that stored rows stay memory-mapped."""
        keys = _sort_keys([getattr(self, name) for name in self.SORTED_BY], self.examples, self.n_examples)
        return self if _is_ascending(keys) else self.select(torch.argsort(keys, stable=True))

    def slice(self: _Block, start: int, stop: int) -> _Block:
        """The examples from ``start`` to ``stop``, renumbered from 0."""
        if (start, stop) == (0, self.n_examples):
            return self
        part = self.select((self.examples >= start) & (self.examples < stop))
        cut: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in self.PER_EXAMPLE}
        return replace(part, n_examples=stop - start, examples=part.examples - start, **cut)

    def arranged(self: _Block, places: Tensor, n_examples: int) -> _Block:
        """Every example moved to its place, and the rows sorted anew.

        Args:
            places: (self.n_examples,) of each example; those with place -1 are left out.
            n_examples: number of places.
        """
        return self.moved(places, n_examples).sorted()

    def moved(self: _Block, places: Tensor, n_examples: int) -> _Block:
        """As :meth:`arranged`, but rows stay in their order and, where none is left out, where they are in memory."""
        examples = places[self.examples]
        kept = examples >= 0
        part = self if bool(kept.all()) else self.select(kept)
        own: dict[str, Any] = {}
        for name in self.PER_EXAMPLE:
            values = getattr(self, name)
            own[name] = values.new_full((n_examples,), torch.nan)
            own[name][places[places >= 0]] = values[places >= 0]
        return replace(part, n_examples=n_examples, examples=examples[kept], **own)

    def to(self: _Block, device: torch.device) -> _Block:
        """The same block with its tensors on a device."""
        moved: dict[str, Any] = {name: column.to(device) for name, column in self.columns.items()}
        return replace(self, **moved)

    def as_dtype(self: _Block, dtype: Dtype) -> _Block:
        """The block as it is stored: directions, where it has some, in another type."""
        return self

    def rows_by_example(self) -> Tensor:
        """(n_examples,) int64, how many rows each example has."""
        return torch.bincount(self.examples, minlength=self.n_examples)


@dataclass(frozen=True)
class DirectedRows(Ragged):
    """Rows that are a direction beside a norm.

    Attributes:
        norms: (R,) float32, Euclidean norm of each row.
        directions: (R, H) float32, float16 or int8, each row a multiple of the gradient.
        lengths: (R,) float32, Euclidean norm of each direction; None where all are 1.
    """

    norms: Tensor
    directions: Tensor
    lengths: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """(R,) what each direction is multiplied with to give the gradient."""
        return self.norms if self.lengths is None else self.norms / self.lengths

    def as_dtype(self: _Directed, dtype: Dtype) -> _Directed:
        """Unit directions in another type; "int8" scales each by its largest entry."""
        if dtype != "int8":
            return replace(self, directions=self.directions.to(DTYPES[dtype]))
        directions, lengths = rows_in_bytes(self.directions)
        return replace(self, directions=directions, lengths=lengths)

    def scaled(self: _Directed, factors: Tensor) -> _Directed:
        """Every example's gradient times its own factor, (n_examples,)."""
        return replace(self, norms=self.norms * factors[self.examples])

    def example_norms(self) -> Tensor:
        """(n_examples,) norm of each example's whole gradient."""
        largest = torch.zeros(self.n_examples, dtype=torch.float32).scatter_reduce(0, self.examples, self.norms, "amax")
        safe = torch.where(largest > 0, largest, 1.0)  # squares of norms under 1e-19 would vanish in float32
        squares = torch.zeros(self.n_examples, dtype=torch.float32).index_add_(
            0, self.examples, (self.norms / safe[self.examples]) ** 2
        )
        return largest * squares.sqrt()


def _sort_keys(columns: Sequence[Tensor], examples: Tensor, n_examples: int) -> Tensor:
    """(R,) what rows are sorted by: the columns, and for equal ones the example."""
    return columns[0] * max(n_examples, 1) + examples if columns else examples


def _places_when_sorted(keys: Tensor) -> Tensor | None:
    """(R,) where each row goes; None where rows are sorted already."""
    if _is_ascending(keys):
        return None
    order = torch.argsort(keys, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places


def _joined(parts: Sequence[Tensor], places: Tensor | None) -> Tensor:
    """One column of the parts' rows, each copied once, to its place: a block for the disk is as large as fits."""
    if places is None:
        return torch.cat(list(parts))
    column = parts[0].new_empty(len(places), *parts[0].shape[1:])
    start = 0
    for part in parts:
        column[places[start : start + len(part)]] = part
        start += len(part)
    return column


def _is_ascending(keys: Tensor) -> bool:
    return bool((keys[1:] >= keys[:-1]).all())
