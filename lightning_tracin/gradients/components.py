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
        basis: (width, r) float32, orthonormal columns, that of the largest eigenvalue first.
        values: (r,) float64, the eigenvalues, not negative.
        mean: the mean of all eigenvalues of M, tr(M) / width.
    """

    basis: Tensor
    values: Tensor
    mean: float

    @classmethod
    def of(cls, moments: Tensor, rank: int | None = None) -> Components:
        """The components of second moments.

        Args:
            moments: (width, width) float64, M.
            rank: how many components to keep, at most; None for all.

        Example:
            >>> found = Components.of(torch.tensor([[2.0, 0.0], [0.0, 0.5]]).double())
            >>> found.values.tolist(), found.mean
            ([2.0, 0.5], 1.25)
        """
        values, vectors = torch.linalg.eigh(moments)
        values = values.flip(0).clamp(min=0)  # ascending, and by rounding below 0 where they are 0
        return cls(vectors.flip(1)[:, :rank].float().contiguous(), values[:rank].clone(), float(values.mean()))

    def scales(self, damping: float) -> Tensor:
        """(r,) float64, (λ + damping · tr(M) / width)^(-1/2) of each eigenvalue λ; 0 where all vectors were zero."""
        if self.mean == 0:
            return torch.zeros_like(self.values)
        return (self.values + damping * self.mean).rsqrt()

    @full_precision()
    def whitened(self, norms: Tensor, directions: Tensor, damping: float | None) -> tuple[Tensor, Tensor]:
        """Vectors x in the coordinates of the components, each multiplied by its scale: (M + ...)^(-1/2) x, rotated.

        Args:
            norms: (R,) what the directions are multiplied by.
            directions: (R, width) multiples of the vectors, no longer than 1.
            damping: see :meth:`scales`.

        Returns:
            The norms (R,) of the whitened vectors, and the vectors divided by them, (R, r), both float32.
        """
        scales = torch.ones_like(self.values) if damping is None else self.scales(damping)
        relative, largest = relative_to_largest(scales)
        lengths, rotated = torch.empty(len(norms)), torch.empty(len(norms), len(scales))
        size = max(1, memory.NUMBERS_AT_ONCE // len(self.basis))
        for start in range(0, len(norms), size):
            part = slice(start, start + size)
            lengths[part], rotated[part] = unit_rows((directions[part].float() @ self.basis) * relative)
        return (lengths.double() * norms.double() * largest).float(), rotated


def relative_to_largest(scales: Tensor) -> tuple[Tensor, float]:
    """Scales divided by the largest, in float32, and that: of gradients of 1e-30 it is 1e30, too much for float32."""
    largest = float(scales.max())
    return (scales / (largest or 1.0)).float(), largest
