"""What all metrics of this folder share."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_tracin.metrics.functional.correlations import precise


class AttributionMetric(Metric):
    """A metric whose value is a scalar, or a named tuple of which one field is drawn."""

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    drawn: ClassVar[str | None] = None  # the field

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What torchmetrics wraps, but without making scalars of tensors (1,), of one test example or one k."""

        @functools.wraps(compute)
        def noting_shapes(*args: Any, **kwargs: Any) -> Any:
            value = compute(*args, **kwargs)
            # Beside the value that torchmetrics keeps, in copies, too.
            self._shapes = _shapes_of(value)
            return value

        wrapped = super()._wrap_compute(noting_shapes)

        @functools.wraps(compute)
        def in_shape(*args: Any, **kwargs: Any) -> Any:
            value = wrapped(*args, **kwargs)
            return _in_shapes(value, self._shapes)

        return in_shape

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Module:
        """What torchmetrics does, but labels, indices and masks keep their type, in which alone they are exact."""

        @functools.wraps(fn)  # torchmetrics asks for its name
        def to_numbers(each: Tensor) -> Tensor:
            made: Tensor = fn(each)
            return made if each.is_floating_point() or made.dtype == each.dtype else each.to(made.device)

        return super()._apply(to_numbers, exclude_state)

    def _add_rows(self, name: str, dtype: torch.dtype | None = None, dims: int = 1) -> None:
        """Add a state of a tensor for each batch, which are joined in their order.

        Args:
            name: of the state.
            dtype: of the tensors; None for what :func:`precise` makes.
            dims: how many dimensions they have.
        """
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._rows = {**getattr(self, "_rows", {}), name: (dtype, dims)}

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        """What torchmetrics does; of a process without a batch it would send tensors of another type and shape."""
        for name, (dtype, dims) in getattr(self, "_rows", {}).items():
            if not getattr(self, name):
                nothing = torch.zeros((0,) * dims, device=self.device)
                setattr(self, name, [precise(nothing) if dtype is None else nothing.to(dtype)])

        def with_rows(each: Tensor, group: Any = None) -> list[Tensor]:
            return [found for found in dist_sync_fn(each, group=group) if not found.ndim or len(found)]

        super()._sync_dist(with_rows, process_group)

    def _tell_apart(self, *options: Any) -> None:
        """Add a state of the class and of the options that ``update`` goes by.

        A MetricCollection updates one metric alone of those whose states have the same names and, after the first
        batch, the same values, as those of two k often have.

        Args:
            options: tensors, or what ``repr`` tells apart.
        """
        digest = hashlib.sha256(type(self).__name__.encode())
        for each in options:
            digest.update(each.cpu().numpy().tobytes() if isinstance(each, Tensor) else repr(each).encode())
        self.add_state("options", default=torch.tensor(list(digest.digest()[:8])), dist_reduce_fx="max")

    def plot(self, val: Any = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draws one value, or several in their order; of a curve, one with its interval where there is one.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of that; None for ``compute()``.
            ax: axes to draw on; None for new ones.

        Returns:
            The figure (None where ``ax`` was given) and its axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        return self._draw(self.compute() if val is None else val, ax)

    def _draw(self, val: Any, ax: _AX_TYPE | None) -> _PLOT_OUT_TYPE:
        """Draws what ``compute`` returned, or a list of that."""
        if self.drawn is not None:
            val = [getattr(each, self.drawn) for each in val] if isinstance(val, list) else getattr(val, self.drawn)
        return self._plot(val, ax)


def _shapes_of(value: Any) -> Any:
    """The shape of a tensor; of a named tuple, those of its fields."""
    return [_shapes_of(each) for each in value] if isinstance(value, tuple) else getattr(value, "shape", None)


def _in_shapes(value: Any, shapes: Any) -> Any:
    """The same in the shapes that :func:`_shapes_of` gave."""
    if isinstance(value, tuple):
        return type(value)(*(_in_shapes(*pair) for pair in zip(value, shapes, strict=True)))
    return value if shapes is None else value.reshape(shapes)
