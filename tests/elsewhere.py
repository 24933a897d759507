"""A pretended accelerator: tensors that say they are on another device, and refuse to meet those of the CPU.

Like Apple's MPS it has no float64. Its numbers are on the CPU. torch has no other device on a machine without one but
"meta", whose name they bear.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapped.inner = inner
        return wrapped

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While it is entered, tensors can be made on and moved to the pretended device; counts what is computed there.

    Attributes:
        operations: the names of what was computed there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(operation, args, kwargs or {})
        if any(isinstance(each, Elsewhere) for each in tree_flatten(result)[0]):
            self.operations.add(operation._schema.name.removeprefix("aten::"))
        return result


class TensorsMade(TorchFunctionMode):
    """While it is entered, ``torch.tensor`` makes tensors on the pretended device, which it does without a dispatch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


class Pretended(CPUAccelerator):
    """For a trainer whose device is the pretended one."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is to be set up."""


def trainer_there() -> dict[str, Any]:
    """Arguments for a trainer on the pretended device; both modes must be entered while it works."""
    strategy = SingleDeviceStrategy(DEVICE, accelerator=Pretended())
    # A wrapped tensor cannot be detached in inference mode.
    return {"accelerator": "auto", "strategy": strategy, "inference_mode": False}


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what the tensors are said to be computed into, after checking that none is elsewhere."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    where = {isinstance(each, Elsewhere) for each in tensors if each.dim() or isinstance(each, Elsewhere)}
    if len(where) > 1 and operation not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation}")
    there = True in where
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu"}
    result = operation(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if there and any(
        isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_flatten(result)[0]
    ):
        raise TypeError(f"This device, as MPS, has no float64: {operation}")
    if operation._schema.is_mutable:  # what was given comes back, not another tensor of the same numbers
        return next((each for each in tensors if _inner(each) is result), result)
    return tree_map(lambda each: Elsewhere(each) if there and isinstance(each, torch.Tensor) else each, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value
