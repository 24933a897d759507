"""The second moments of a linear layer's inputs and output gradients, whose Kronecker product is K-FAC's Fisher matrix.

Martens and Grosse 2015, arXiv 1503.05671.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_tracin.gradients import memory
from lightning_tracin.gradients.components import Components
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.matrix_gradients import MatrixGradients


@dataclass(frozen=True)
class KroneckerFactors:
    """A layer's second moments, as components.

    Attributes:
        inputs: of A = mean h h', h the layer's input, without the bias.
        deltas: of G = mean δ δ', δ the gradient at its output.
    """

    inputs: Components
    deltas: Components

    @property
    def widths(self) -> tuple[int, int]:
        """The numbers of the layer's inputs and outputs."""
        return len(self.inputs.basis), len(self.deltas.basis)

    def whitened(self, factors: FactorGradients, damping: float | None) -> FactorGradients:
        """Gradients with both factors whitened, see :meth:`Components.whitened`."""
        return FactorGradients(
            factors.n_examples,
            factors.examples,
            *self.inputs.whitened(factors.input_norms, factors.inputs, damping),
            *self.deltas.whitened(factors.delta_norms, factors.deltas, damping),
        )

    def projected(self, factors: FactorGradients) -> MatrixGradients:
        """Gradients as matrices in the coordinates of the components; what is orthogonal to them is left out.

        Args:
            factors: the gradients, without the bias.

        Raises:
            ValueError: if they are of another layer.
        """
        if factors.widths != self.widths:
            raise ValueError(
                f"K-FAC's components are of a layer with {self.widths[0]} inputs and {self.widths[1]} outputs, but the "
                f"gradients have {factors.widths}: one of them is of another model, or damaged."
            )
        return MatrixGradients.from_factors(self.whitened(factors, None), None)


@dataclass(frozen=True)
class KroneckerSums:
    """Sums over positions, which add up over batches and processes.

    Attributes:
        n_positions: how many positions.
        inputs: (in, in) float64, Σ h h'.
        deltas: (out, out) float64, Σ δ δ'.
    """

    n_positions: int
    inputs: Tensor
    deltas: Tensor

    @classmethod
    def of(cls, factors: FactorGradients) -> KroneckerSums:
        """The sums over the positions of a block of examples, without the bias."""
        inputs = _second_moments(factors.input_norms, factors.inputs)
        return cls(len(factors.examples), inputs, _second_moments(factors.delta_norms, factors.deltas))

    @classmethod
    def total(cls, sums: Sequence[KroneckerSums]) -> KroneckerSums:
        """The sums over several blocks, at least one."""
        inputs, deltas = torch.zeros_like(sums[0].inputs), torch.zeros_like(sums[0].deltas)
        for each in sums:
            inputs += each.inputs
            deltas += each.deltas
        return cls(sum(each.n_positions for each in sums), inputs, deltas)

    def factors(self, rank: tuple[int, int] | None) -> KroneckerFactors:
        """The second moments, with at most ``rank`` components of inputs and of outputs; None for all."""
        n_inputs, n_outputs = rank or (None, None)
        number = max(self.n_positions, 1)
        inputs = Components.of(self.inputs / number, n_inputs)
        return KroneckerFactors(inputs, Components.of(self.deltas / number, n_outputs))


def without_bias(factors: FactorGradients, has_bias: bool | None) -> FactorGradients:
    """Gradients of a layer's weight alone, in a view: without the 1 that a bias appends to the inputs.

    Directions of the inputs are shorter than 1 then.

    Args:
        factors: the gradients.
        has_bias: whether the layer has a bias.
    """
    return replace(factors, inputs=factors.inputs[:, :-1]) if has_bias else factors


def _second_moments(norms: Tensor, directions: Tensor) -> Tensor:
    """(width, width) float64, the sum of the outer products of vectors with themselves."""
    width = directions.shape[1]
    moments = torch.zeros(width, width, dtype=torch.float64)
    size = max(1, memory.NUMBERS_AT_ONCE // width)
    for start in range(0, len(norms), size):
        part = slice(start, start + size)
        rows = directions[part].double() * norms[part].double()[:, None]
        moments += rows.T @ rows
    return moments
