"""The shapes of data in memory: word gradients, linear gradients, and what goes with them.

Gradients keep every row as a direction beside its float32 norm. The norm is what methods scale, select and rank by;
the direction is what is multiplied, and what can be stored in half precision, or in a byte for each number, however
small the gradient is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_tracin.precision import full_precision

#: What directions are kept in.
Dtype: TypeAlias = Literal["float32", "float16", "int8"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class WordGradients:
    """Gradients of ``n_examples`` losses at the word embedding table: one row for each word of each example.

    Attributes:
        n_examples: number of examples in this block.
        examples: (R,) int64, the example that each row belongs to, counted from 0 inside the block.
        tokens: (R,) int64, the token id of each row. No (example, token) pair occurs twice.
        norms: (R,) float32, Euclidean norm of each row.
        directions: (R, H) float32, float16 or int8, each row a multiple of the gradient.
        lengths: (R,) float32, Euclidean norm of each direction; None where all are 1.
    """

    n_examples: int
    examples: Tensor
    tokens: Tensor
    norms: Tensor
    directions: Tensor
    lengths: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """(R,) what each direction is multiplied with to give the gradient."""
        return self.norms if self.lengths is None else self.norms / self.lengths

    @classmethod
    def from_positions(cls, n_examples: int, examples: Tensor, tokens: Tensor, gradients: Tensor) -> WordGradients:
        """Sum the gradients at the embedding's output, one for each position, into one row per word and example.

        Args:
            n_examples: number of examples in the batch.
            examples: (P,) the example of each position.
            tokens: (P,) the token id at each position.
            gradients: (P, H) the gradient at each position. Words whose sum is zero are left out.
        """
        keys, row_of = torch.unique(tokens * n_examples + examples, return_inverse=True)
        rows = torch.zeros(len(keys), gradients.shape[1], device=gradients.device, dtype=torch.float32)
        rows.index_add_(0, row_of, gradients.float())
        norms, directions = unit_rows(rows)
        words = cls(n_examples, keys % n_examples, keys // n_examples, norms, directions)
        return words if bool((norms != 0).all()) else words.select(norms != 0)

    @classmethod
    def cat(cls, blocks: Sequence[WordGradients]) -> WordGradients:
        """Join blocks one after the other; examples are renumbered, and rows are sorted by (token, example)."""
        n_examples, examples = sum(block.n_examples for block in blocks), _renumbered(blocks)
        tokens = torch.cat([block.tokens for block in blocks])
        order = torch.argsort(tokens * max(n_examples, 1) + examples)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        directions = blocks[0].directions.new_empty(len(order), blocks[0].directions.shape[1])
        start = 0
        for block in blocks:  # each row to its place at once: a block for the disk is as large as memory allows
            directions[place[start : start + len(block.tokens)]] = block.directions
            start += len(block.tokens)
        norms, lengths = torch.cat([block.norms for block in blocks]), _joined([block.lengths for block in blocks])
        lengths = None if lengths is None else lengths[order]
        return cls(n_examples, examples[order], tokens[order], norms[order], directions, lengths)

    def select(self, rows: Tensor | slice) -> WordGradients:
        """Only the given rows: a boolean mask (R,), row numbers, or a slice, which copies nothing."""
        return replace(
            self,
            examples=self.examples[rows],
            tokens=self.tokens[rows],
            norms=self.norms[rows],
            directions=self.directions[rows],
            lengths=None if self.lengths is None else self.lengths[rows],
        )

    def sorted_by_token(self) -> WordGradients:
        """Rows sorted by token and, for one token, by example: the order in which words are joined."""
        keys = self.tokens * max(self.n_examples, 1) + self.examples
        if bool((keys[1:] >= keys[:-1]).all()):
            return self  # stored rows are, and stay memory-mapped
        return self.select(torch.argsort(keys))

    def as_dtype(self, dtype: Dtype) -> WordGradients:
        """Unit directions in another dtype; "int8" scales each by its largest entry."""
        if dtype != "int8":
            return replace(self, directions=self.directions.to(DTYPES[dtype]))
        directions, lengths = _in_bytes(self.directions)
        return replace(self, directions=directions, lengths=lengths)

    def projected(self, projection: Tensor) -> WordGradients:
        """Directions times a (H, p) matrix, (R, p), scaled to length 1; norms stay those of the whole gradients."""
        # in float64, which neither autocast nor a setting of torch rounds: this runs in a thread beside training
        _, directions = unit_rows((self.directions.double() @ projection.double()).float())
        return replace(self, directions=directions)

    def without(self, tokens: Sequence[int]) -> WordGradients:
        """The rows of some tokens set to zero, without a copy of the others."""
        left_out = torch.isin(self.tokens, torch.tensor(list(tokens)))
        return replace(self, norms=torch.where(left_out, 0.0, self.norms))

    def slice(self, start: int, stop: int) -> WordGradients:
        """The examples from ``start`` to ``stop``, renumbered from 0."""
        if (start, stop) == (0, self.n_examples):
            return self
        part = self.select((self.examples >= start) & (self.examples < stop))
        return replace(part, n_examples=stop - start, examples=part.examples - start)

    def arranged(self, places: Tensor, n_examples: int) -> WordGradients:
        """Every example moved to its place, (self.n_examples,), among ``n_examples``; those with place -1 left out."""
        return self.moved(places, n_examples).sorted_by_token()

    def moved(self, places: Tensor, n_examples: int) -> WordGradients:
        """As :meth:`arranged`, but rows stay in their order and, where none is left out, where they are in memory."""
        examples = places[self.examples]
        kept = examples >= 0
        part = self if bool(kept.all()) else self.select(kept)
        return replace(part, n_examples=n_examples, examples=examples[kept])

    def scaled(self, factors: Tensor) -> WordGradients:
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

    def top_words(self, k: int) -> WordGradients:
        """Each example's ``k`` rows of largest norm (ties go to the smaller token id)."""
        by_norm = torch.argsort(self.norms, descending=True, stable=True)
        order = by_norm[torch.argsort(self.examples[by_norm], stable=True)]
        counts = torch.bincount(self.examples, minlength=self.n_examples)
        rank = torch.arange(len(order)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return self.select(torch.sort(order[rank < k]).values)


@dataclass(frozen=True)
class LinearGradients:
    """Gradients of ``n_examples`` losses at a linear layer, as the two factors of each position's outer product.

    The gradient of example i is the sum over its positions of ``delta ⊗ input``; it is never formed. A classifier's
    head has one position for each example, a head applied to every token has many. A layer with a bias has a 1
    appended to its input, so that the bias is one more column of the weight.

    Attributes:
        n_examples: number of examples in this block.
        examples: (P,) int64, the example of each position, ascending.
        input_norms: (P,) float32.
        inputs: (P, in) or (P, in + 1), each position's input divided by its norm.
        delta_norms: (P,) float32.
        deltas: (P, out), each position's gradient at the layer's output divided by its norm.
    """

    n_examples: int
    examples: Tensor
    input_norms: Tensor
    inputs: Tensor
    delta_norms: Tensor
    deltas: Tensor

    @classmethod
    def from_positions(cls, n_examples: int, examples: Tensor, inputs: Tensor, deltas: Tensor) -> LinearGradients:
        """From raw factors; positions whose gradient is zero (unlabelled, padding) are left out.

        Args:
            n_examples: number of examples in the batch.
            examples: (P,) the example of each position.
            inputs: (P, in) the layer's input, a 1 appended if the layer has a bias.
            deltas: (P, out) the gradient at the layer's output.
        """
        delta_norms, deltas = unit_rows(deltas.float())
        input_norms, inputs = unit_rows(inputs.float())
        return cls(n_examples, examples, input_norms, inputs, delta_norms, deltas).select(
            torch.nonzero((delta_norms != 0) & (input_norms != 0))[:, 0]
        )

    @classmethod
    def cat(cls, blocks: Sequence[LinearGradients]) -> LinearGradients:
        """Join blocks one after the other; examples are renumbered, and positions are sorted by example."""
        examples = _renumbered(blocks)
        order = None if _ascending(examples) else torch.argsort(examples, stable=True)

        def column(*parts: Tensor) -> Tensor:
            if order is None:
                return torch.cat(parts)
            return (parts[0] if len(parts) == 1 else torch.cat(parts))[order]  # one copy: a block may be a whole shard

        return cls(
            sum(block.n_examples for block in blocks),
            column(examples),
            column(*(block.input_norms for block in blocks)),
            column(*(block.inputs for block in blocks)),
            column(*(block.delta_norms for block in blocks)),
            column(*(block.deltas for block in blocks)),
        )

    def select(self, positions: Tensor) -> LinearGradients:
        """Only the given positions: a boolean mask (P,) or position numbers."""
        return replace(
            self,
            examples=self.examples[positions],
            input_norms=self.input_norms[positions],
            inputs=self.inputs[positions],
            delta_norms=self.delta_norms[positions],
            deltas=self.deltas[positions],
        )

    def as_dtype(self, dtype: Dtype) -> LinearGradients:
        """Unit factors in another dtype; "int8" scales each by its largest entry."""
        if dtype == "int8":
            return replace(self, inputs=_in_bytes(self.inputs)[0], deltas=_in_bytes(self.deltas)[0])
        return replace(self, inputs=self.inputs.to(DTYPES[dtype]), deltas=self.deltas.to(DTYPES[dtype]))

    def slice(self, start: int, stop: int) -> LinearGradients:
        """The examples from ``start`` to ``stop``, renumbered from 0."""
        if (start, stop) == (0, self.n_examples):
            return self
        part = self.select((self.examples >= start) & (self.examples < stop))
        return replace(part, n_examples=stop - start, examples=part.examples - start)

    def arranged(self, places: Tensor, n_examples: int) -> LinearGradients:
        """Every example moved to its place, (self.n_examples,), among ``n_examples``; those with place -1 left out."""
        moved = self.moved(places, n_examples)
        return moved.select(torch.argsort(moved.examples, stable=True))

    def moved(self, places: Tensor, n_examples: int) -> LinearGradients:
        """As :meth:`arranged`, but rows stay in their order and, where none is left out, where they are in memory."""
        examples = places[self.examples]
        kept = examples >= 0
        part = self if bool(kept.all()) else self.select(kept)
        return replace(part, n_examples=n_examples, examples=examples[kept])

    def scaled(self, factors: Tensor) -> LinearGradients:
        """Every example's gradient times its own factor, (n_examples,)."""
        return replace(self, delta_norms=self.delta_norms * factors[self.examples])

    @full_precision()
    def example_norms(self, weights: Tensor | None = None) -> Tensor:
        """(n_examples,) norm of each example's whole gradient G: the root of Σ weights · G², weights (out, in)."""
        counts = torch.bincount(self.examples, minlength=self.n_examples)
        if weights is None and not bool((counts > 1).any()):
            return torch.zeros(self.n_examples, dtype=torch.float32).index_add_(
                0, self.examples, self.input_norms * self.delta_norms
            )
        norms = torch.zeros(self.n_examples, dtype=torch.float32)
        stops = counts.cumsum(0)
        for example, (start, stop) in enumerate(zip((stops - counts).tolist(), stops.tolist(), strict=True)):
            inputs, deltas = self.inputs[start:stop].float(), self.deltas[start:stop].float()
            scale = (self.input_norms[start:stop] * self.delta_norms[start:stop]).double()
            if weights is None:
                gram = (inputs @ inputs.T).double() * (deltas @ deltas.T).double()
                square = scale @ gram @ scale
            else:
                gradient = (deltas * scale.float()[:, None]).T @ inputs
                square = (weights * gradient.double() ** 2).sum()
            norms[example] = square.clamp(min=0).sqrt()
        return norms


@dataclass(frozen=True)
class SecondMoments:
    """Adam's bias-corrected second moments of a layer's weight.

    Attributes:
        values: (rows, columns) of the weight; for a linear layer with a bias, its bias is the last column.
        rows: (rows,) sorted token ids, where only the rows of words that were trained on are kept; else None.
        eps: Adam's epsilon.
    """

    values: Tensor
    rows: Tensor | None
    eps: float

    def of_tokens(self, tokens: Tensor) -> SecondMoments:
        """Those of some tokens' rows, (len(tokens), columns); 0 for a token that was not trained on."""
        if self.rows is None:
            return replace(self, values=self.values[tokens])
        found = torch.searchsorted(self.rows, tokens).clamp(max=len(self.rows) - 1)
        known = self.rows[found] == tokens
        return SecondMoments(self.values[found] * known[:, None], None, self.eps)

    def weights(self) -> Tensor:
        """What a product of two gradients is multiplied with: 1 / (root + eps); 0 where Adam has not stepped yet."""
        return torch.where(self.values > 0, 1 / (self.values.sqrt() + self.eps), 0.0)


@dataclass(frozen=True)
class Texts:
    """What the examples of a block say: their token ids, in reading order, and their labels.

    Attributes:
        n_examples: number of examples in this block.
        examples: (P,) int64, the example of each position, ascending.
        ids: (P,) int64, token ids.
        labels: (n_examples,) float64, NaN for an example that has not one number as its label.
    """

    n_examples: int
    examples: Tensor
    ids: Tensor
    labels: Tensor

    @classmethod
    def empty(cls, n_examples: int) -> Texts:
        """Examples that say nothing."""
        none = torch.empty(0, dtype=torch.long)
        return cls(n_examples, none, none, torch.full((n_examples,), torch.nan, dtype=torch.float64))

    @classmethod
    def cat(cls, blocks: Sequence[Texts]) -> Texts:
        """Join blocks one after the other; examples are renumbered, and positions are sorted by example."""
        examples = _renumbered(blocks)
        order = torch.argsort(examples, stable=True)
        return cls(
            sum(block.n_examples for block in blocks),
            examples[order],
            torch.cat([block.ids for block in blocks])[order],
            torch.cat([block.labels for block in blocks]),
        )

    def slice(self, start: int, stop: int) -> Texts:
        """The examples from ``start`` to ``stop``, renumbered from 0."""
        if (start, stop) == (0, self.n_examples):
            return self
        inside = (self.examples >= start) & (self.examples < stop)
        return Texts(stop - start, self.examples[inside] - start, self.ids[inside], self.labels[start:stop])

    def arranged(self, places: Tensor, n_examples: int) -> Texts:
        """Every example moved to its place, (self.n_examples,), among ``n_examples``; those with place -1 left out."""
        moved = self.moved(places, n_examples)
        order = torch.argsort(moved.examples, stable=True)
        return replace(moved, examples=moved.examples[order], ids=moved.ids[order])

    def moved(self, places: Tensor, n_examples: int) -> Texts:
        """As :meth:`arranged`, but positions stay in their order."""
        examples = places[self.examples]
        kept = examples >= 0
        labels = torch.full((n_examples,), torch.nan, dtype=self.labels.dtype)
        labels[places[places >= 0]] = self.labels[places >= 0]
        return Texts(n_examples, examples[kept], self.ids[kept], labels)

    def equals(self, other: Texts) -> bool:
        """Whether both say the same."""
        labels = torch.equal(self.labels.nan_to_num(), other.labels.nan_to_num())
        return labels and torch.equal(self.examples, other.examples) and torch.equal(self.ids, other.ids)

    def ids_of(self, example: int) -> list[int]:
        """One example's token ids."""
        return self.ids[self.examples == example].tolist()

    def ids_by_example(self) -> list[list[int]]:
        """Every example's token ids."""
        counts = torch.bincount(self.examples, minlength=self.n_examples).tolist()
        return [ids.tolist() for ids in torch.split(self.ids, counts)]

    def label_of(self, example: int) -> float | None:
        """One example's label; None where it has none."""
        label = float(self.labels[example])
        return None if math.isnan(label) else label


Gradients: TypeAlias = WordGradients | LinearGradients
_Gradients = TypeVar("_Gradients", WordGradients, LinearGradients)

#: What can be stored.
Block: TypeAlias = Gradients | Texts


@dataclass(frozen=True)
class Kept:
    """What is kept of gradients to save space.

    Attributes:
        dtype: what directions are stored in.
        top_words: each example's words of largest norm, so many of them; None for all.
        projection: numbers that each word's direction is projected to at random; None for no projection.
    """

    dtype: Dtype
    top_words: int | None = None
    projection: int | None = None

    def of(self, gradients: Gradients) -> Gradients:
        """The gradients without what is not kept, in full precision; both sides of a product go through this."""
        if isinstance(gradients, WordGradients) and self.top_words is not None:
            gradients = gradients.top_words(self.top_words)
        if isinstance(gradients, WordGradients) and self.projection is not None:
            gradients = gradients.projected(projection_matrix(gradients.directions.shape[1], self.projection))
        return gradients


@cache
def projection_matrix(hidden: int, size: int) -> Tensor:
    """A fixed matrix (hidden, size) of normal numbers, which almost keeps the angles between directions.

    Raises:
        ValueError: if it would not make them smaller.
    """
    if size >= hidden:
        raise ValueError(f"projection={size} saves nothing: word gradients have {hidden} numbers for each word.")
    numbers = np.random.RandomState(0).standard_normal((hidden, size))  # a stream that never changes
    return torch.from_numpy(numbers).float()


def on_device(gradients: _Gradients, device: torch.device) -> _Gradients:
    """The same gradients with their tensors on a device."""
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(gradients).items() if isinstance(value, Tensor)
    }
    return replace(gradients, **tensors)


def distinct(tokens: Tensor) -> list[int]:
    """The token ids that occur, each once, ascending."""
    return [int(token) for token in torch.unique(tokens)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors one after the other, if there are any."""
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _ascending(examples: Tensor) -> bool:
    return bool((examples[1:] >= examples[:-1]).all())


def _in_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, H) as int8, scaled so that each row's largest entry is 127, and the norms of those (R,)."""
    rows = rows.float()
    if rows.numel() == 0:
        return rows.to(torch.int8), rows.new_zeros(rows.shape[0])
    scaled = (rows * (127 / rows.abs().amax(dim=1, keepdim=True))).round()
    return scaled.to(torch.int8), scaled.norm(dim=1)


def _renumbered(blocks: Sequence[WordGradients] | Sequence[LinearGradients] | Sequence[Texts]) -> Tensor:
    """The blocks' example numbers, (rows,), counted on from block to block."""
    numbered, offset = [], 0
    for block in blocks:
        numbered.append(block.examples + offset)
        offset += block.n_examples
    return torch.cat(numbered)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split (R, H) rows into norms (R,) and unit vectors (R, H), exactly also where squares would underflow."""
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0]), rows
    largest = rows.abs().amax(dim=1)
    scaled = rows / torch.where(largest > 0, largest, 1.0)[:, None]
    length = scaled.norm(dim=1)
    return largest * length, scaled / torch.where(length > 0, length, 1.0)[:, None]
