"""Gradients at a linear layer as two factors for each position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tracin.gradients import memory
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import DTYPES, Dtype, rows_in_bytes, unit_rows


@dataclass(frozen=True)
class FactorGradients(Ragged):
    """Gradients of ``n_examples`` losses at a linear layer, as the two factors of each position's outer product.

    The gradient of example i is the sum over its positions of ``delta ⊗ input``, a matrix that is formed only where it
    is needed. A classifier's head has one position for each example, a layer applied to every token has many. A layer
    with a bias has a 1 appended to its input, so that the bias is the last column of the weight.

    Attributes:
        input_norms: (R,) float32, the norm of each position's input.
        inputs: (R, in) or (R, in + 1), each position's input divided by its norm.
        delta_norms: (R,) float32, the norm of each position's gradient at the layer's output.
        deltas: (R, out), each position's gradient at the layer's output divided by its norm.
    """

    KIND: ClassVar[str] = "factors"

    input_norms: Tensor
    inputs: Tensor
    delta_norms: Tensor
    deltas: Tensor

    @classmethod
    def from_positions(cls, n_examples: int, examples: Tensor, inputs: Tensor, deltas: Tensor) -> FactorGradients:
        """Gradients from unnormalised factors; positions with a gradient of zero (unlabelled, padding) are left out.

        Args:
            n_examples: number of examples in the batch.
            examples: (P,) the example of each position, ascending.
            inputs: (P, in) the layer's input, a 1 appended if the layer has a bias.
            deltas: (P, out) the gradient at the layer's output.
        """
        reached = torch.nonzero(deltas.any(1))[:, 0]  # in the last block of a [CLS] classifier these are few
        if len(reached) < len(deltas):
            examples, inputs, deltas = examples[reached], inputs[reached], deltas[reached]
        delta_norms, deltas = unit_rows(deltas.float())
        input_norms, inputs = unit_rows(inputs.float())
        factors = cls(n_examples, examples, input_norms, inputs, delta_norms, deltas)
        is_nonzero = (delta_norms != 0) & (input_norms != 0)
        return factors if bool(is_nonzero.all()) else factors.select(torch.nonzero(is_nonzero)[:, 0])

    def minus(self, others: FactorGradients) -> FactorGradients:
        """The gradients of these losses minus others of the same examples: the positions of both."""
        both = FactorGradients.cat([self, replace(others, deltas=-others.deltas)])
        return both.arranged(torch.arange(self.n_examples).repeat(2), self.n_examples)

    @property
    def scaled_inputs(self) -> Tensor:
        """(R, in) float32, the inputs multiplied by their norms."""
        return self.inputs.float() * self.input_norms[:, None]

    @property
    def scaled_deltas(self) -> Tensor:
        """(R, out) float32, the gradients at the output multiplied by their norms."""
        return self.deltas.float() * self.delta_norms[:, None]

    def as_dtype(self, dtype: Dtype) -> FactorGradients:
        """The same gradients with unit factors in another type; "int8" scales each vector by its largest entry."""
        if dtype == "int8":
            return replace(self, inputs=rows_in_bytes(self.inputs)[0], deltas=rows_in_bytes(self.deltas)[0])
        return replace(self, inputs=self.inputs.to(DTYPES[dtype]), deltas=self.deltas.to(DTYPES[dtype]))

    def scaled(self, factors: Tensor) -> FactorGradients:
        """Every example's gradient multiplied by its own factor, from ``factors`` (n_examples,)."""
        return replace(self, delta_norms=self.delta_norms * factors[self.examples])

    def example_norms(self, weights: Tensor | None = None) -> Tensor:
        """(n_examples,) float32, the norm of each example's gradient G.

        Args:
            weights: (out, in); with them, the norm is the root of Σ weights · G².
        """
        products = self.input_norms.double() * self.delta_norms.double()
        counts = self.rows_by_example()
        if weights is None and not bool((counts > 1).any()):
            return torch.zeros(self.n_examples, dtype=torch.float64).index_add_(0, self.examples, products).float()
        squares = torch.zeros(self.n_examples, dtype=torch.float64)
        if weights is None:
            width = self.inputs.shape[1] + self.deltas.shape[1]
            for examples, positions, present in self.padded(lambda length: length * (width + 2 * length)):
                inputs, deltas = self.inputs[positions].double(), self.deltas[positions].double()
                scale = products[positions] * present
                gram = (inputs @ inputs.mT) * (deltas @ deltas.mT)
                squares[examples] = torch.einsum("bs,bst,bt->b", scale, gram, scale).clamp(min=0)
        else:
            for examples, matrices in self.matrices():
                squares[examples] = (weights * matrices**2).sum((1, 2))
        return squares.sqrt().float()

    def matrices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples' gradients as matrices, for a group of examples at a time.

        They are computed in float64, which neither autocast nor torch's matmul precision rounds.

        Yields:
            Numbers of examples that have positions, (b,), and their gradients, (b, out, in) float64.
        """
        n_in, n_out = self.inputs.shape[1], self.deltas.shape[1]
        for examples, positions, present in self.padded(lambda length: length * (n_in + n_out) + n_in * n_out):
            deltas = self.deltas[positions].double() * (self.delta_norms[positions] * present)[..., None]
            inputs = self.inputs[positions].double() * self.input_norms[positions][..., None]
            yield examples, deltas.mT @ inputs

    def padded(self, entries: Callable[[int], int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The examples in groups of similar numbers of positions, padded to the longest of the group.

        Args:
            entries: the size of an example's dense tensors, from its number of positions; it limits the groups.

        Yields:
            Numbers of examples (b,), the rows of their positions (b, length), and a mask (b, length) that is False for
            padding, where an example's first row is repeated.
        """
        counts = self.rows_by_example()
        starts = counts.cumsum(0) - counts
        order = torch.argsort(counts, stable=True)
        order = order[counts[order] > 0]
        lengths = counts[order].tolist()
        start = 0
        while start < len(lengths):
            # Examples are in ascending order of length, so a group's last one sets its width.
            stop = start + 1
            while stop < len(lengths) and (stop + 1 - start) * entries(lengths[stop]) <= memory.NUMBERS_AT_ONCE:
                stop += 1
            examples = order[start:stop]
            place = torch.arange(lengths[stop - 1])
            present = place < counts[examples, None]
            yield examples, starts[examples, None] + place * present, present
            start = stop
