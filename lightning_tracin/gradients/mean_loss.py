"""The losses of a module that only returns their mean, and the check that it is one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_tracin.gradients.batches import batch_size, described_batch, row_of, shallow
from lightning_tracin.gradients.losses import is_half
from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.parallel.fsdp import forwarded


class MeanLoss:
    """The losses of a module that only has a ``training_step`` which returns their mean.

    The gradient of the sum of the examples' losses is B times the gradient of their mean, so the mean repeated B times
    stands for them. That it *is* the mean of independent losses is checked by :meth:`check`, on a first batch.

    Args:
        module: a LightningModule with automatic optimization.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, batch: Any) -> Tensor:
        """The mean loss of a batch, repeated for each of its examples, (B,)."""
        return forwarded(self.module, self._training_loss, batch).expand(_size(batch))

    def rows(self, batch: Any) -> list[Any]:
        """The examples of a batch, each as a batch of its own."""
        size = _size(batch)
        return [row_of(batch, row, size) for row in range(size)]

    @full_precision()
    def check(self, batch: Any) -> None:
        """Check that the loss of the batch is the mean of the losses of its rows.

        Raises:
            ValueError: if it is not, or cannot be computed; the message names ``TracInMixin``.
        """
        with torch.no_grad():
            whole = float(forwarded(self.module, self._training_loss, batch))
            rows = [float(forwarded(self.module, self._training_loss, row)) for row in self.rows(batch)]
        mean = sum(rows) / len(rows)
        tolerance = 2e-2 if is_half(self.module) else 1e-4
        if not abs(whole - mean) <= tolerance * max(abs(whole), abs(mean)) + 1e-7:
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {whole:.6g} for a batch of {len(rows)} "
                f"examples, but {mean:.6g} is the mean of what it returned for each of them alone: its loss is not a "
                f"mean of independent losses. {_use_mixin()}."
            )

    def check_batch_first(self, batch: Any, layers: Sequence[nn.Module]) -> None:
        """Check that layers are called with the examples in the first dimension; with only a mean, nothing tells later.

        Raises:
            ValueError: if one is called with time first.
        """
        shapes: list[torch.Size] = []
        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hooks.callback(layer.register_forward_hook(lambda _, __, output: shapes.append(output.shape)).remove)
            forwarded(self.module, self._training_loss, row_of(batch, 0, _size(batch)))
        if any(len(shape) > 2 and shape[0] > 1 == shape[1] for shape in shapes):
            raise ValueError(
                f"{type(self.module).__name__} calls a layer with time in the first dimension, where the mean that its "
                f"training_step returns does not tell examples from positions. {_use_mixin()}."
            )

    def _training_loss(self, batch: Any) -> Tensor:
        if not getattr(self.module, "automatic_optimization", True):
            raise ValueError(f"{type(self.module).__name__} optimizes manually in training_step. {_use_mixin()}.")
        module = _stand_in(self.module)
        for name in ("log", "log_dict"):  # there is nothing to log outside of training
            module.__dict__[name] = lambda *_, **__: None
        step = module.training_step
        batch = shallow(batch)
        try:
            output = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # it looks for what only training has
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"The training_step of {type(self.module).__name__} cannot be called by itself: {why}. {_use_mixin()}."
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {described_batch(output)}, not one mean "
                f"loss. {_use_mixin()}."
            )
        return loss.reshape(())


def _stand_in(module: nn.Module) -> Any:
    """A module that shares another's layers and weights, and keeps what a ``training_step`` remembers to itself.

    Its attributes, lists, buffers and metrics are its own.
    """
    copied: Any = object.__new__(type(module))
    for name, value in vars(module).items():
        copied.__dict__[name] = copy(value) if isinstance(value, (list, dict, set)) else value
    for name, buffer in module._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            copied._modules[name] = deepcopy(child)
        elif any(isinstance(part, Metric) for part in child.modules()):
            copied._modules[name] = _stand_in(child)
    return copied


def _size(batch: Any) -> int:
    size = batch_size(batch)
    if size is None:
        raise ValueError(f"Cannot tell how many examples a batch of {described_batch(batch)} holds. {_use_mixin()}.")
    return size


def _use_mixin() -> str:
    mixin = "Put TracInMixin before LightningModule in the bases, and override influence_loss(batch)"
    return f"{mixin} (for a Hugging Face model, its default serves)"
