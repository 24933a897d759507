"""What a pass does with each batch: take gradients, or look at what the model says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pytorch_lightning as pl
from torch import Tensor

from lightning_tracin.bridge.mixin import labels_of_module
from lightning_tracin.bridge.module_gradients import ModuleGradients
from lightning_tracin.bridge.observing import lacks_labels
from lightning_tracin.bridge.targets import TargetLosses
from lightning_tracin.gradients.capture import Captured


class Step(Protocol):
    """What is done with each batch of a pass, on the module's device, in eval mode and with gradients enabled."""

    @property
    def module(self) -> pl.LightningModule:
        """What batches are run through."""

    def begin(self, spare: Any) -> None:
        """Learn from a batch what a first one tells, as all processes of FSDP must at once."""

    def __call__(self, batch: Any, numbers: Sequence[int] | None) -> Any:
        """What a batch gives.

        Args:
            batch: the module's.
            numbers: of its examples; None for a batch that only fills up.
        """


class GradientStep:
    """The gradients of a batch's examples.

    Args:
        gradients: takes them; the first batch is also checked to have losses of single examples.
        targets: what is explained of test examples; None for training examples, whose losses are the module's own.
    """

    def __init__(self, gradients: ModuleGradients, targets: TargetLosses | None = None) -> None:
        self._gradients = gradients
        self._targets = targets

    @property
    def module(self) -> pl.LightningModule:
        """What batches are run through."""
        return self._gradients.module

    def begin(self, spare: Any) -> None:
        """Check the losses on a batch, and learn from it where the examples are in the layers' calls."""
        if self._gradients.is_new:
            self._check(spare)
            with self._missing_labels_named(spare):
                losses = None if self._targets is None else self._targets.of(spare, None)[0]
                self._gradients.learn_layouts(spare, losses)

    def __call__(self, batch: Any, numbers: Sequence[int] | None) -> Captured:
        """The gradients of a batch; of a pair of classes, the difference of the two."""
        self._check(batch)
        if self._targets is None:
            return self._gradients.capture(batch)
        with self._missing_labels_named(batch):
            first, *second = self._targets.of(batch, numbers)
            captured = self._gradients.capture(batch, first)
            return captured.minus(self._gradients.capture(batch, second[0])) if second else captured

    def _check(self, batch: Any) -> None:
        if self._gradients.is_new:
            with self._missing_labels_named(batch):
                self._gradients.check_mean(batch if self._targets is None else self._targets.checked_batch(batch))

    @contextmanager
    def _missing_labels_named(self, batch: Any) -> Iterator[None]:
        """Say of an error that the batch has no labels, if it lacks any, and what explains it without."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            needs_them = self._targets is not None and self._targets.target.what == "label"
            labels = labels_of_module(self.module, batch)
            if not needs_them or not (labels is None or lacks_labels(labels)):
                raise
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f'{what.rstrip(".")}. If these test examples have no labels, target="prediction" explains what the '
                "model says of them."
            ) from error


class PredictionStep:
    """What the model says of a batch's examples, which their targets are made of."""

    def __init__(self, module: pl.LightningModule, targets: TargetLosses) -> None:
        self.module = module
        self._targets = targets

    def begin(self, spare: Any) -> None:
        """Check the target on a batch."""
        self._targets.see(spare, None)

    def __call__(self, batch: Any, numbers: Sequence[int] | None) -> Tensor:
        """What the model says of each example, which is remembered."""
        return self._targets.see(batch, numbers)
