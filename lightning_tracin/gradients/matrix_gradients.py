"""Gradients at a linear layer as one matrix for each example, optionally projected at its input and its output."""

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

    With many positions a matrix takes less space than its factors, and less still when it is projected: both factors
    are multiplied by a random matrix and then summed over positions (Choe et al. 2024, arXiv 2405.13954, "LoGra").
    Norms stay those of the gradients before projection.
    """

    KIND: ClassVar[str] = "matrix"

    @classmethod
    def from_factors(cls, factors: FactorGradients, projection: tuple[int, int] | None) -> MatrixGradients:
        """The matrices of the examples' gradients.

        Args:
            factors: the gradients as two factors for each position.
            projection: sizes (a, b) to which the gradient at the output and the input are projected; None for no
                projection.
        """
        norms = factors.example_norms()
        examples = torch.nonzero(norms != 0)[:, 0]
        narrow = factors
        if projection is not None:
            narrow = FactorGradients.from_positions(
                factors.n_examples,
                factors.examples,
                projected(factors.inputs, projection[1], seed=1) * factors.input_norms[:, None],
                projected(factors.deltas, projection[0], seed=2) * factors.delta_norms[:, None],
            )
        matrices = torch.zeros(factors.n_examples, narrow.deltas.shape[1] * narrow.inputs.shape[1], dtype=torch.float64)
        for numbers, gradients in narrow.matrices():
            matrices[numbers] = gradients.flatten(1)
        _, directions = unit_rows(matrices[examples])
        return cls(factors.n_examples, examples, norms[examples], directions.float())

    def weighted_norms(self, weights: Tensor) -> Tensor:
        """(n_examples,) float32, the root of Σ weights · G² for each example's gradient G, with weights (out, in)."""
        squares = (self.directions.double() ** 2) @ weights.double().flatten()
        norms = torch.zeros(self.n_examples, dtype=torch.float32)
        norms[self.examples] = (squares.sqrt() * self.factors.double()).float()
        return norms
