"""The precision in which a module computes, and in which torch multiplies float32 numbers.

``torch.set_float32_matmul_precision``, which Lightning advises on GPUs with Tensor Cores, lets torch multiply float32
numbers with 11 or 8 bits of each: as TF32 on a GPU, as bfloat16 on a CPU that supports it. A model may compute in that
precision. Scores may not: their relative error would be about 1e-3, and word terms would not add up to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_tracin.parallel.fsdp import mixed_precision_dtypes

_REDUCED = ("tf32", "bf16")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers in float32, regardless of torch's settings; usable as a context or as a decorator.

    The settings belong to the process: do not enter this context in one thread while another thread trains.
    """
    with ExitStack() as stack:
        if _allows_tf32(torch.backends.cudnn):  # torch's default for convolutions and recurrent layers
            torch.backends.cudnn.allow_tf32 = False
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
        products = [getattr(backend, "matmul", None) for backend in (torch.backends.mkldnn, torch.backends.cuda)]
        convolutions = [getattr(torch.backends.mkldnn, name, None) for name in ("conv", "rnn")]
        operations = [setting for setting in (*products, *convolutions) if hasattr(setting, "fp32_precision")]
        for operation in operations:
            _set_full(operation, stack)
        if not operations:  # before torch 2.9
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the types that numbers have, also inside a fit in mixed precision."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def loss_tolerance(module: nn.Module) -> float:
    """The relative difference of a loss, or of a gradient's norm, that other shapes of a batch may make by rounding."""
    return 5e-2 if uses_half_precision(module) else 1e-3


def uses_half_precision(module: nn.Module) -> bool:
    """Whether a module computes in 16 bits: under autocast, by its weights' type, or by FSDP's mixed precision."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return True
    dtypes = {parameter.dtype for parameter in module.parameters()} | mixed_precision_dtypes(module)
    return not dtypes.isdisjoint((torch.bfloat16, torch.float16))


def _set_full(operation: Any, stack: ExitStack) -> None:
    """Let an operation compute in full float32 precision until the stack is closed."""
    precision = operation.fp32_precision
    if precision in _REDUCED:
        operation.fp32_precision = "none"  # with "none", the attribute reads as the setting that it inherits
        is_inherited = operation.fp32_precision == precision
        stack.callback(setattr, operation, "fp32_precision", "none" if is_inherited else precision)
        operation.fp32_precision = "ieee"


def _allows_tf32(cudnn: Any) -> bool:
    """Whether cuDNN may use TF32. Torch before 2.9 has one setting for convolutions and recurrent layers."""
    if not hasattr(cudnn, "conv"):
        return bool(cudnn.allow_tf32)
    return bool(cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "tf32")
