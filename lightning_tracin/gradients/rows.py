"""Rows of numbers as unit directions beside their norms, and the types that directions are kept in.

The norm is what methods scale, select and rank by; the direction is what is multiplied, and what can be stored in half
precision, or in a byte for each number, however small the gradient is.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

#: What directions are kept in.
Dtype: TypeAlias = Literal["float32", "float16", "int8"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split (R, H) rows into norms (R,) and unit vectors (R, H), exactly also where squares would underflow."""
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0]), rows
    largest = rows.abs().amax(dim=1)
    scaled = rows / torch.where(largest > 0, largest, 1.0)[:, None]
    length = scaled.norm(dim=1)
    return largest * length, scaled / torch.where(length > 0, length, 1.0)[:, None]


def rows_in_bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, H) as int8, scaled so that each row's largest entry is 127, and the norms of those (R,)."""
    rows = rows.float()
    if rows.numel() == 0:
        return rows.to(torch.int8), rows.new_zeros(rows.shape[0])
    scaled = (rows * (127 / rows.abs().amax(dim=1, keepdim=True))).round()
    return scaled.to(torch.int8), scaled.norm(dim=1)


@cache
def projection_matrix(width: int, size: int, seed: int = 0) -> Tensor:
    """A fixed matrix (width, size) of normal numbers, float32, which almost keeps the angles between rows."""
    numbers = np.random.RandomState(seed).standard_normal((width, size))  # a stream that never changes
    return torch.from_numpy(numbers).float()


def projected(rows: Tensor, size: int, seed: int = 0) -> Tensor:
    """Rows (R, width) times the fixed matrix of a seed, (R, size); the rows themselves where they are no wider.

    The product is computed in float64, which neither autocast nor a setting of torch rounds: it may run in a thread
    beside training.
    """
    if size >= rows.shape[1]:
        return rows.float()
    return (rows.double() @ projection_matrix(rows.shape[1], size, seed).double()).float()


def unique_tokens(tokens: Tensor) -> list[int]:
    """The token ids that occur, each once, ascending."""
    return [int(token) for token in torch.unique(tokens)]
