"""Self-influence compared with that of examples of the same label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tracin.scoring.spread import Spread
from lightning_tracin.storage.checkpoint import Checkpoint, ever_drawn
from lightning_tracin.storage.trace import Trace, training_labels


def within_classes(values: Tensor, labels: Tensor) -> Tensor:
    """How many standard deviations each value lies above the mean of those with its label.

    Args:
        values: (n,) such as self-influence; NaN for examples that do not count.
        labels: (n,) float; NaN for examples without.

    Returns:
        (n,) float32: 0 where all of a class are alike, or one stands alone; NaN without a value or a label.

    Example:
        >>> within_classes(torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
        tensor([-1.2247,  0.0000,  1.2247, -1.0000,  1.0000])
    """
    found = torch.full_like(values, torch.nan)
    counts = ~values.isnan() & ~labels.isnan()
    for label in torch.unique(labels[counts]):
        own = counts & (labels == label)
        spread = Spread.of(values[own]).deviation
        deviations = values[own].double() - values[own].double().mean()
        found[own] = (deviations / spread).to(found.dtype) if spread else 0.0
    return found


def within_classes_of(trace: Trace, checkpoints: Sequence[Checkpoint], self_influence: Tensor) -> Tensor:
    """As :func:`within_classes`, by the labels of a trace; NaN for examples that training never drew.

    Args:
        trace: has the labels.
        checkpoints: those that count.
        self_influence: (n_train,) of its training examples.

    Raises:
        ValueError: if it has no labels that are one number for each example.
    """
    labels = training_labels(trace)
    if not len(labels) or bool(labels.isnan().all()):
        raise ValueError(
            f"within_class=True compares examples of the same label, but the trace in {trace.path} has no labels that "
            "are one number for each: they are those of influence_labels(batch)."
        )
    drawn = ever_drawn(checkpoints)
    values = self_influence if drawn is None else torch.where(drawn, self_influence, torch.nan)
    return within_classes(values, labels)
