"""The second moments of vectors, as the principal components that they are widest in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tracin.gradients import memory
from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.gradients.rows import unit_rows


@dataclass(frozen=True)
class Components:
    """The leading eigenvectors of M = mean x x' of some vectors x, which are not centred.

    Attributes:
        basis: (width, r) float32, orthonormal columns, of the largest eigenvalue first.
        values: (r,) float64, the eigenvalues, not negative.
        mean: the mean of all eigenvalues of M, tr(M) / width.
    """

    basis: Tensor
    values: Tensor
    mean: float

    @classmethod
    def of(cls, norms: Tensor, directions: Tensor, rank: int | None = None) -> Components:
        """The components of vectors, computed in float64.

        Args:
            norms: (R,) what the directions are multiplied by.
            directions: (R, width) multiples of the vectors, no longer than 1.
            rank: how many components to keep, at most; None for all.

        Example:
            >>> found = Components.of(torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            >>> found.values.tolist(), found.mean
            ([2.0, 0.5], 1.25)
        """
        width = directions.shape[1]
        moments = torch.zeros(width, width, dtype=torch.float64)
        size = max(1, memory.NUMBERS_AT_ONCE // width)
        for start in range(0, len(norms), size):
            part = slice(start, start + size)
            rows = directions[part].double() * norms[part].double()[:, None]
            moments += rows.T @ rows
        values, vectors = torch.linalg.eigh(moments / max(len(norms), 1))
        values = values.flip(0).clamp(min=0)  # ascending, and by rounding below 0 where they are 0
        return cls(vectors.flip(1)[:, :rank].float(), values[:rank], float(values.mean()))

    def scales(self, damping: float) -> Tensor:
        """(r,) float64, (λ + damping · tr(M) / width)^(-1/2) of each eigenvalue λ; 0 where all vectors were zero."""
        if self.mean == 0:
            return torch.zeros_like(self.values)
        return (self.values + damping * self.mean).rsqrt()

    @full_precision()
    def whitened(self, norms: Tensor, directions: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Vectors x in the coordinates of the components, each multiplied by its scale: (M + ...)^(-1/2) x, rotated.

        Args:
            norms: see :meth:`of`.
            directions: see :meth:`of`.
            damping: see :meth:`scales`.

        Returns:
            The norms (R,) of the whitened vectors, and the vectors divided by them, (R, r), both float32.
        """
        scales = self.scales(damping)
        largest = float(scales.max())  # of gradients of 1e-30 it is 1e30; apart, no step leaves the range of float32
        relative = (scales / largest if largest else scales).float()
        lengths, whitened = torch.empty(len(norms)), torch.empty(len(norms), len(scales))
        size = max(1, memory.NUMBERS_AT_ONCE // len(self.basis))
        for start in range(0, len(norms), size):
            part = slice(start, start + size)
            lengths[part], whitened[part] = unit_rows((directions[part].float() @ self.basis) * relative)
        return (lengths.double() * norms.double() * largest).float(), whitened
