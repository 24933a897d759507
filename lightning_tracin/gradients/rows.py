"""Vectors as unit directions and norms: normalisation, quantisation and random projection.

Methods scale, select and rank by norms, and multiply directions. Directions of length 1 can be stored in half precision
or as int8, however small the gradient is.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

#: The names of the types that directions are stored in.
Dtype: TypeAlias = Literal["float32", "float16", "int8"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows (R, H) into norms (R,) and unit vectors (R, H), also if the squares of entries would underflow."""
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0]), rows
    largest = rows.abs().amax(dim=1)
    scaled = rows / torch.where(largest > 0, largest, 1.0)[:, None]
    length = scaled.norm(dim=1)
    return largest * length, scaled / torch.where(length > 0, length, 1.0)[:, None]


def rows_in_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows (R, H) to int8, with 127 for each row's largest magnitude.

    Returns:
        (R, H) int8, and the norms (R,) of these rows before they are cast, float32.
    """
    rows = rows.float()
    if rows.numel() == 0:
        return rows.to(torch.int8), rows.new_zeros(rows.shape[0])
    scaled = (rows * (127 / rows.abs().amax(dim=1, keepdim=True))).round()
    return scaled.to(torch.int8), scaled.norm(dim=1)


@cache
def projection_matrix(width: int, size: int, seed: int = 0) -> Tensor:
    """A fixed Gaussian matrix (width, size), float32: a random projection that nearly preserves angles between rows."""
    # The stream of RandomState is the same in every version of NumPy, so stored projections stay comparable.
    numbers = np.random.RandomState(seed).standard_normal((width, size))
    return torch.from_numpy(numbers).float()


def projected(rows: Tensor, size: int, seed: int = 0) -> Tensor:
    """Rows (R, width) multiplied by the projection matrix of a seed, (R, size); unprojected if ``size`` >= width.

    The product is computed in float64, which neither autocast nor torch's matmul precision rounds: it may run in a
    thread beside training, where the settings of the process must not be changed.
    """
    if size >= rows.shape[1]:
        return rows.float()
    return (rows.double() @ projection_matrix(rows.shape[1], size, seed).double()).float()


def unique_tokens(tokens: Tensor) -> list[int]:
    """The distinct token ids of a tensor, ascending."""
    return [int(token) for token in torch.unique(tokens)]
