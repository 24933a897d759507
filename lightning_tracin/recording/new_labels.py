"""Checks that go on while batches come: losses are of single examples, also where a label comes for the first time.

A loss that weighs classes, averages over tokens or ignores a label looks like any other on examples of frequent labels,
or of as many labels each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.bridge.mixin import labels_of_module, losses_of
from lightning_tracin.gradients.batches import batch_size, counts_of, row_of
from lightning_tracin.gradients.losses import checked_losses
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.precision import full_precision, loss_tolerance

_MOST = 64  # different labels that are looked at: where there are more, as in language models, each batch has new ones
_MOST_NUMBERS = 8  # different numbers of labels that are looked at


@dataclass(frozen=True)
class New:
    """What a batch's labels have that no batch before it had.

    Attributes:
        labels: those that are whole numbers.
        numbers: how many its examples have, where they differ.
    """

    labels: frozenset[int] = frozenset()
    numbers: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.labels or self.numbers)

    def __str__(self) -> str:
        if self.labels:
            return f"its labels hold {sorted(self.labels)}, which no batch before it held"
        return f"its examples have {', '.join(map(str, sorted(self.numbers)))} labels, which none before it had"

    def rows(self, labels: Tensor) -> list[int]:
        """The places of the examples that have it."""
        flat = labels.cpu().reshape(len(labels), -1)
        is_new = torch.isin(flat.double(), torch.tensor(sorted(self.labels)).double()).any(1)
        counts = counts_of(labels)
        if counts is not None:
            is_new |= torch.isin(torch.tensor(counts), torch.tensor(sorted(self.numbers), dtype=torch.int64))
        return torch.nonzero(is_new)[:, 0].tolist()


class NewLabels:
    """Looks at each batch that holds labels which no batch before it held.

    Args:
        module: whose losses they are.
        first: a batch whose losses have been checked.
    """

    def __init__(self, module: nn.Module, first: Any) -> None:
        self._module = module
        self._losses = losses_of(module)
        self._first = first
        self._seen: set[int] = set()
        self._numbers: set[int] = set()
        self.add(self.of(first))

    def of(self, batch: Any) -> New:
        """What is new in a batch's labels; nothing where they are not whole numbers, of any type, or too many."""
        size = batch_size(batch)
        labels = None if size is None else labels_of_module(self._module, batch, size)
        if labels is None:
            return New()
        numbers = set(counts_of(labels) or ())
        known = numbers if len(numbers) < 2 or len(self._numbers) > _MOST_NUMBERS else self._numbers
        return New(frozenset(self._new_labels(labels)), frozenset(numbers - known))

    def _new_labels(self, labels: Tensor) -> set[int]:
        if len(self._seen) > _MOST:
            return set()
        values = torch.unique(labels.cpu()).double()
        return set(values.long().tolist()) - self._seen if bool((values.frac() == 0).all()) else set()

    def add(self, new: New) -> None:
        """Remember what a batch brought that has been checked."""
        self._seen |= new.labels
        self._numbers |= new.numbers

    @full_precision()
    @torch.no_grad()
    def check(self, batch: Any, losses: Tensor, new: New) -> None:
        """Check that the losses of a batch with new labels are those of its examples alone.

        Args:
            batch: on the module's device.
            losses: (B,) those of its examples in the batch; of no account for a module that knows only their mean.
            new: what :meth:`of` says of it.

        Raises:
            ValueError: if they are not.
        """
        if isinstance(self._losses, MeanLoss):
            self._losses.check(batch)
            return
        of_first = checked_losses(self._losses(self._first)).float().cpu()
        if not self._is_alone(self._first, of_first, 0):
            return  # batches cannot be cut into their examples, so that nothing follows from doing so
        labels = labels_of_module(self._module, batch, len(losses))
        assert labels is not None
        for place in new.rows(labels)[:4]:
            if not self._is_alone(batch, losses, place):
                raise ValueError(
                    f"The losses of {type(self._module).__name__} depend on the batch where {new}: that of one of its "
                    f"examples is {float(losses[place]):.4g} in a batch of {len(losses)}, but another alone. Divide an "
                    "example's loss by what it holds itself (its tokens, its outputs), never by what its batch does."
                )

    def _is_alone(self, batch: Any, losses: Tensor, place: int) -> bool:
        """Whether an example that is cut out of its batch has the loss that it has inside."""
        try:
            alone = checked_losses(self._losses(row_of(batch, place, len(losses)))).float().cpu()
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError):  # the model is not made for what was cut
            return False
        tolerance = loss_tolerance(self._module)
        return len(alone) == 1 and bool(torch.isclose(alone[0], losses[place], rtol=tolerance, atol=1e-6))
