"""Parameters that a ``training_step`` writes into by itself, such as those of a mean teacher, put back after a look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def parameters_unwritten(module: nn.Module) -> Iterator[None]:
    """Give a module's parameters back what they hold now, however they are written to: in place, by ``.data``, or anew.

    Only what is written to is copied, when that is about to happen.
    """
    # one that is made of several tensors, as where weights are quantised, has no storage to look at
    held = [(each, each.data) for each in module.parameters() if type(each.data) is Tensor]
    watch = _Writes([data for _, data in held])
    try:
        with watch:
            yield
    finally:
        with torch.no_grad():
            for data, value in watch.overwritten:
                data.copy_(value)
        for parameter, data in held:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation of torch before it writes into some tensors, whatever views and aliases it is given of them.

    Args:
        tensors: the tensors.

    Attributes:
        overwritten: those that were written into, each with a copy of what it held.
    """

    supports_higher_order_operators = True  # which write into none

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self._by_storage: dict[int, list[Tensor]] = defaultdict(list)
        for each in tensors:
            self._by_storage[each.untyped_storage().data_ptr()].append(each)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(operation, "_schema", None)
        if schema is not None and schema.is_mutable:
            for place, argument in enumerate(schema.arguments):
                if argument.is_write:
                    self._about_to_write(args[place] if place < len(args) else kwargs.get(argument.name))
        return operation(*args, **kwargs)

    def _about_to_write(self, into: Any) -> None:
        for each in into if isinstance(into, (list, tuple)) else (into,):
            if type(each) in (Tensor, nn.Parameter):
                of_storage = self._by_storage.pop(each.untyped_storage().data_ptr(), ())
                self.overwritten += [(tensor, tensor.clone()) for tensor in of_storage]
