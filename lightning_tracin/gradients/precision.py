"""How exactly torch multiplies float32 numbers.

``torch.set_float32_matmul_precision``, which Lightning advises on GPUs with Tensor Cores, lets float32 products be
computed from 8 or 11 bits of each number, on a GPU by TF32 and on a CPU that has instructions for it by bfloat16. The
model may use that; scores may not: they would be wrong by parts in a thousand, and words would not add up to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers in float32, whatever is set; also a decorator.

    The setting is the whole process's: do not enter it in a thread while another one trains.
    """
    with ExitStack() as stack:
        if _allows_tf32(torch.backends.cudnn):  # convolutions and recurrent layers; so it is by default
            torch.backends.cudnn.allow_tf32 = False
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
        products = [getattr(backend, "matmul", None) for backend in (torch.backends.mkldnn, torch.backends.cuda)]
        convolutions = [getattr(torch.backends.mkldnn, name, None) for name in ("conv", "rnn")]
        operations = [each for each in (*products, *convolutions) if hasattr(each, "fp32_precision")]
        for operation in operations:
            _set_full(operation, stack)
        if not operations:  # before torch 2.9
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def _set_full(operation: Any, stack: ExitStack) -> None:
    """Let an operation compute in full, until the stack is left."""
    found = operation.fp32_precision
    if found in _REDUCED:
        operation.fp32_precision = "none"
        inherited = operation.fp32_precision == found
        stack.callback(setattr, operation, "fp32_precision", "none" if inherited else found)
        operation.fp32_precision = "ieee"


def _allows_tf32(cudnn: Any) -> bool:
    """Whether cuDNN may use TF32; before torch 2.9 it has one setting."""
    if not hasattr(cudnn, "conv"):
        return bool(cudnn.allow_tf32)
    return bool(cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "tf32")
