"""How exactly torch multiplies float32 matrices.

``torch.set_float32_matmul_precision``, which Lightning advises on GPUs with Tensor Cores, lets float32 products be
computed from 8 or 11 bits of each number, on a GPU by TF32 and on a CPU that has instructions for it by bfloat16. The
model may use that; scores may not: they would be wrong by parts in a thousand, and words would not add up to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever is set; also a decorator."""
    backends = _backends()
    if backends:
        set_to = [(each, each.fp32_precision) for each in backends if each.fp32_precision in _REDUCED]
        for each, _ in set_to:
            each.fp32_precision = "ieee"
        try:
            yield
        finally:
            for each, value in set_to:
                each.fp32_precision = value
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products_are_rounded() -> bool:
    """Whether float32 matrices may be multiplied from fewer bits."""
    backends = _backends()
    if backends:
        return any(each.fp32_precision in _REDUCED for each in backends)
    return torch.get_float32_matmul_precision() != "highest"


def _backends() -> list[Any]:
    """The matrix products that have a setting of their own; none before torch 2.9, which has one for all."""
    products = [getattr(backend, "matmul", None) for backend in (torch.backends.mkldnn, torch.backends.cuda)]
    return [each for each in products if hasattr(each, "fp32_precision")]
