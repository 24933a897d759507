"""The losses of a module whose ``training_step`` returns only their mean, and the checks that this requires."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_tracin.gradients.batches import batch_size, described_batch, row_of, shallow_copy
from lightning_tracin.gradients.precision import full_precision, uses_half_precision
from lightning_tracin.parallel.fsdp import call_in_forward_pass


class MeanLoss:
    """The losses of a module whose ``training_step`` returns only their mean.

    The gradient of the sum of the examples' losses is B times the gradient of their mean, so the mean repeated B times
    takes the place of the losses. :meth:`check` verifies on a first batch that it is a mean of independent losses.

    Args:
        module: a LightningModule with automatic optimization.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, batch: Any) -> Tensor:
        """The mean loss of a batch, repeated for each of its examples, (B,).

        Raises:
            ValueError: if ``training_step`` fails outside of training, or does not return one mean loss.
        """
        return call_in_forward_pass(self.module, self._training_loss, batch).expand(_size(batch))

    def rows(self, batch: Any) -> list[Any]:
        """The examples of a batch, each as a batch of one."""
        size = _size(batch)
        return [row_of(batch, row, size) for row in range(size)]

    @full_precision()
    def check(self, batch: Any) -> None:
        """Check that the loss of the batch is the mean of its examples' losses, each computed in a batch of one.

        Raises:
            ValueError: if it is not, or if a loss cannot be computed; the message names ``TracInMixin``.
        """
        with torch.no_grad():
            batch_loss = float(call_in_forward_pass(self.module, self._training_loss, batch))
            losses = [float(call_in_forward_pass(self.module, self._training_loss, row)) for row in self.rows(batch)]
        mean = sum(losses) / len(losses)
        tolerance = 2e-2 if uses_half_precision(self.module) else 1e-4
        if not abs(batch_loss - mean) <= tolerance * max(abs(batch_loss), abs(mean)) + 1e-7:
            raise ValueError(
                f"The training_step of {type(self.module).__name__} returned {batch_loss:.6g} for a batch of "
                f"{len(losses)} examples, but {mean:.6g} is the mean of what it returned for each of them alone: its "
                f"loss is not a mean of independent losses. {_use_mixin()}."
            )

    def check_batch_first(self, batch: Any, layers: Sequence[nn.Module]) -> None:
        """Check that layers are called with the examples in the first dimension.

        Gradients of a mean loss cannot show which dimension counts the examples, so it has to be the first one.

        Args:
            batch: a batch; its first example is run.
            layers: the layers that gradients are taken at.

        Raises:
            ValueError: if a layer is called with time in the first dimension.
        """
        shapes: list[torch.Size] = []
        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hooks.callback(layer.register_forward_hook(lambda _, __, output: shapes.append(output.shape)).remove)
            call_in_forward_pass(self.module, self._training_loss, row_of(batch, 0, _size(batch)))
        if any(len(shape) > 2 and shape[0] > 1 == shape[1] for shape in shapes):
            raise ValueError(
                f"{type(self.module).__name__} calls a layer with time in the first dimension, where the mean that its "
                f"training_step returns does not tell examples from positions. {_use_mixin()}."
            )

    def _training_loss(self, batch: Any) -> Tensor:
        """The loss that ``training_step`` returns for a batch, as a scalar."""
        if not getattr(self.module, "automatic_optimization", True):
            raise ValueError(f"{type(self.module).__name__} optimizes manually in training_step. {_use_mixin()}.")
        module = _stand_in(self.module)
        for name in ("log", "log_dict"):  # Lightning refuses to log outside of its loops
            module.__dict__[name] = lambda *_, **__: None
        step = module.training_step
        batch = shallow_copy(batch)
        try:
            output = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
        ) as error:  # it may need what only training sets up
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
    """A copy of a module that shares its layers and weights, but none of the state that a ``training_step`` may change.

    Attributes, lists, dictionaries, sets, buffers and metrics are copied.
    """
    copied: Any = object.__new__(type(module))
    for name, value in vars(module).items():
        copied.__dict__[name] = copy(value) if isinstance(value, (list, dict, set)) else value
    for name, buffer in module._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            copied._modules[name] = deepcopy(child)
        elif any(isinstance(submodule, Metric) for submodule in child.modules()):
            copied._modules[name] = _stand_in(child)
    return copied


def _size(batch: Any) -> int:
    """The number of examples in a batch.

    Raises:
        ValueError: if the batch contains no tensor that has one entry for each example.
    """
    size = batch_size(batch)
    if size is None:
        raise ValueError(f"Cannot tell how many examples a batch of {described_batch(batch)} holds. {_use_mixin()}.")
    return size


def _use_mixin() -> str:
    mixin = "Put TracInMixin before LightningModule in the bases, and override influence_loss(batch)"
    return f"{mixin} (for a Hugging Face model, its default serves)"
