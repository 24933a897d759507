"""Gradients at a linear layer as one matrix for each example, whole or projected on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.ragged import DirectedRows
from lightning_tracin.gradients.rows import projected, unit_rows


@dataclass(frozen=True)
class MatrixGradients(DirectedRows):
    """Gradients of ``n_examples`` losses at a linear layer: one flattened matrix for each example that has a gradient.

    With many positions a matrix takes less space than its factors, all the more when it is projected (Choe et al.
    2024, arXiv 2405.13954, "LoGra": both factors are multiplied with a random matrix, then summed over positions).
    Norms stay those of the whole gradients.
    """

    KIND: ClassVar[str] = "matrix"

    @classmethod
    def from_factors(cls, factors: FactorGradients, projection: tuple[int, int] | None) -> MatrixGradients:
        """The examples' matrices.

        Args:
            factors: gradients by position.
            projection: sizes (a, b) that the gradient at the output and the input are projected to; None keeps both.
        """
        norms = factors.example_norms()
        examples = torch.nonzero(norms != 0)[:, 0]
        small = factors
        if projection is not None:
            small = FactorGradients.from_positions(
                factors.n_examples,
                factors.examples,
                projected(factors.inputs, projection[1], seed=1) * factors.input_norms[:, None],
                projected(factors.deltas, projection[0], seed=2) * factors.delta_norms[:, None],
            )
        matrices = torch.zeros(factors.n_examples, small.deltas.shape[1] * small.inputs.shape[1], dtype=torch.float64)
        for numbers, of_examples in small.matrices():
            matrices[numbers] = of_examples.flatten(1)
        _, directions = unit_rows(matrices[examples])
        return cls(factors.n_examples, examples, norms[examples], directions.float())

    def weighted_norms(self, weights: Tensor) -> Tensor:
        """(n_examples,) the root of Σ weights · G² of each example's gradient G, weights (out, in)."""
        squares = (self.directions.double() ** 2) @ weights.double().flatten()
        norms = torch.zeros(self.n_examples, dtype=torch.float32)
        norms[self.examples] = (squares.sqrt() * self.factors.double()).float()
        return norms
