"""The linear algebra of a dual ridge: a (U + a I)⁻¹ U, with the whole kernel U or by way of some landmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.storage.scratch import Scratch

_COLUMNS_AT_ONCE = 256  # of a kernel, which are solved for
_ROWS_AT_ONCE = 4096  # of the columns at landmarks, in float64


class Solver(Protocol):
    """What solves for a number of test examples."""

    def solved(self, products: Tensor) -> Tensor:
        """(n, m) float32, a (U + a I)⁻¹ products, of products (n, m)."""

    def on_themselves(self) -> Tensor:
        """(n,) float32, the diagonal of a (U + a I)⁻¹ U."""

    def kept(self, scratch: Scratch) -> Solver:
        """The same solver, memory-mapped from a temporary file."""


@dataclass(frozen=True)
class WholeKernel:
    """By a Cholesky factor of U + a I.

    Attributes:
        shift: a.
        factor: (n, n) float32, the lower factor.
        kernel: (n, n) float32, U; None in what is kept, which is not asked about training examples.
    """

    shift: float
    factor: Tensor
    kernel: Tensor | None

    @classmethod
    def of(cls, kernel: Tensor, shift: float) -> WholeKernel:
        """Factorise a kernel (n, n).

        Raises:
            ValueError: if it is not positive definite in float32.

        Example:
            >>> WholeKernel.of(torch.eye(2), 1.0).solved(torch.ones(2, 1)).flatten()
            tensor([0.5000, 0.5000])
        """
        diagonal = kernel.diagonal().clone()
        kernel.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(kernel)
        kernel.diagonal().copy_(diagonal)  # what a large shift would round
        if int(info):
            raise ValueError(
                f"The kernel of {len(kernel):,} training examples cannot be factorised in float32, a = {shift:g}. "
                "Use a larger alpha."
            )
        return cls(shift, factor, kernel)

    @full_precision()
    def solved(self, products: Tensor) -> Tensor:
        """As :class:`Solver`."""
        return self.shift * self._by_factor(products)

    @full_precision()
    def on_themselves(self) -> Tensor:
        """As :class:`Solver`, column by column: a (I - a (U + a I)⁻¹) is the same, but loses its digits in the 1."""
        assert self.kernel is not None
        starts = range(0, len(self.kernel), _COLUMNS_AT_ONCE)
        columns = zip(starts, torch.split(self.kernel, _COLUMNS_AT_ONCE, dim=1), strict=True)
        return self.shift * torch.cat([self._by_factor(each)[start:].diagonal().clone() for start, each in columns])

    def _by_factor(self, products: Tensor) -> Tensor:
        """(U + a I)⁻¹ products; ``torch.cholesky_solve`` would copy the factor each time."""
        halves = torch.linalg.solve_triangular(self.factor, products, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(self.factor.mT, halves, upper=True)
        return solved

    def kept(self, scratch: Scratch) -> WholeKernel:
        """As :class:`Solver`. LAPACK has columns one after the other, safetensors rows."""
        return replace(self, factor=scratch.put_tensor(self.factor.mT).mT, kernel=None)


@dataclass(frozen=True)
class Landmarks:
    """By Nyström's approximation U ≈ C W⁻¹ C', with C the columns of U at some examples, the landmarks, W their rows.

    Then a (U + a I)⁻¹ = I - C (a W + C' C)⁻¹ C' (Woodbury).

    Attributes:
        shift: a.
        columns: (n, l) float32, C.
        factor: (l, l) float64, the lower Cholesky factor of a W + C' C.
    """

    shift: float
    columns: Tensor
    factor: Tensor

    @classmethod
    def of(cls, columns: Tensor, places: Tensor, shift: float) -> Landmarks:
        """Factorise what the columns (n, l) of a kernel at some places (l,) tell.

        Raises:
            ValueError: if it is not positive definite, as where two landmarks are the same.
        """
        inner = shift * columns[places].double()
        for rows in torch.split(columns, _ROWS_AT_ONCE):
            inner += rows.double().T @ rows.double()
        # What float32 rounds may make it indefinite where landmarks are alike.
        inner.diagonal().add_(1e-6 * float(inner.diagonal().mean()))
        factor, info = torch.linalg.cholesky_ex(inner)
        if int(info):
            raise ValueError(f"The kernel at {len(places):,} landmarks cannot be factorised. Use a larger alpha.")
        return cls(shift, columns, factor)

    @full_precision()
    def solved(self, products: Tensor) -> Tensor:
        """As :class:`Solver`."""
        return products - self.columns @ torch.cholesky_solve((self.columns.T @ products).double(), self.factor).float()

    @full_precision()
    def on_themselves(self) -> Tensor:
        """As :class:`Solver`: a times the diagonal of C (a W + C' C)⁻¹ C'."""
        pieces = []
        for rows in torch.split(self.columns, _ROWS_AT_ONCE):
            halves = torch.linalg.solve_triangular(self.factor, rows.T.double(), upper=False)
            pieces.append((halves**2).sum(0).float())
        return self.shift * torch.cat(pieces)

    def kept(self, scratch: Scratch) -> Landmarks:
        """As :class:`Solver`."""
        factor = scratch.put_tensor(self.factor.mT).mT
        return replace(self, columns=scratch.put_tensor(self.columns), factor=factor)
