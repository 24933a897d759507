"""Ranks and correlations of many columns at once."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-9  # what is smaller, beside what it was computed from, is taken for 0


def precise(values: Tensor) -> Tensor:
    """The values in float64, or where a device has none, in float32."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def ranks(values: Tensor) -> Tensor:
    """Each value's rank in its column, 1 for the lowest; equal values share the mean of their ranks.

    Args:
        values: (m, n).

    Example:
        >>> ranks(torch.tensor([[0.3], [0.1], [0.3]])).flatten()
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    rows = values.T.contiguous()
    in_order = rows.sort(dim=1).values
    below = torch.searchsorted(in_order, rows)
    not_above = torch.searchsorted(in_order, rows, right=True)
    return precise(below + not_above + 1).T / 2


def ranks_without(values: Tensor, ranked: Tensor, row: int) -> Tensor:
    """The ranks (m - 1, n) that the others have when one row is left out.

    Args:
        values: (m, n).
        ranked: (m, n) their ranks.
        row: the row that is left out.
    """
    kept = torch.arange(len(values), device=values.device) != row
    others, out = values[kept], values[row]
    return ranked[kept] - (others > out).to(ranked) - (others == out).to(ranked) / 2


def settled(values: Tensor) -> Tensor:
    """The values (m, n), where what differs in a column by rounding alone is the same."""
    is_rounding = values.amax(0) - values.amin(0) <= _ROUNDING * values.abs().amax(0)
    return values.where(~is_rounding, values[:1])


def residuals(values: Tensor, nuisance: Tensor) -> Tensor:
    """What is left (m, n) of each column without its mean and what is linear in the nuisance; 0 where that is rounding.

    Args:
        values: (m, n).
        nuisance: (m, c) what is regressed out; its columns may depend on each other.
    """
    centred = values - values.mean(0)
    basis = column_space(nuisance)
    left = centred - basis @ (basis.T @ centred)
    is_rounding = left.abs().amax(0) <= _ROUNDING * values.abs().amax(0)
    return left.where(~is_rounding, torch.zeros_like(left))


def column_space(nuisance: Tensor) -> Tensor:
    """An orthonormal basis (m, rank) of the columns (m, c) without their means."""
    vectors: Tensor
    vectors, sizes, _ = torch.linalg.svd(nuisance - nuisance.mean(0), full_matrices=False)
    return vectors[:, sizes > _ROUNDING * max(nuisance.shape) * sizes.max().clamp_min(1)]


def standardised(values: Tensor) -> Tensor:
    """The columns (m, n) without their means, with a mean square of 1; 0 where a column is constant."""
    centred = values - values.mean(0)
    spread = centred.square().mean(0).sqrt()
    is_constant = spread <= _ROUNDING * values.abs().amax(0)
    return torch.where(is_constant, torch.zeros_like(centred), centred / spread)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """The correlation (n,) of the columns of two (m, n) that are standardised; 0 where one of them is."""
    return (first * second).mean(0).clamp(-1, 1)
