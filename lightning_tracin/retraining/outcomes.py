"""What retrained modules say of the test examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What one retrained module says.

    Attributes:
        losses: (n_test,) float32, the module's own loss of each test example, in eval mode.
        log_probabilities: (n_test, n_classes) float32 of each class; None where a test example's output is not one of
            several classes.
        weights: a hash of the module's weights; None where it is not known.
    """

    losses: Tensor
    log_probabilities: Tensor | None
    weights: str | None = None


@dataclass(frozen=True)
class Outcomes:
    """What modules say that were retrained on each of some subsets with each of some seeds.

    Attributes:
        subsets: (m, n_train) bool, True for the training examples that were kept.
        seeds: the seeds, s of them.
        losses: (m, s, n_test) float32, the module's own loss of each test example, in eval mode.
        log_probabilities: (m, s, n_test, n_classes) float32 of each class; None where a test example's output is not
            one of several classes.
    """

    subsets: Tensor
    seeds: tuple[int, ...]
    losses: Tensor
    log_probabilities: Tensor | None

    @classmethod
    def of(cls, subsets: Tensor, seeds: Sequence[int], found: Sequence[Sequence[Outcome]]) -> Outcomes:
        """Join single outcomes, those of each subset in a row."""
        losses = torch.stack([torch.stack([each.losses for each in row]) for row in found])
        said = [[each.log_probabilities for each in row] for row in found]
        known = [torch.stack([each for each in row if each is not None]) for row in said if None not in row]
        return cls(subsets, tuple(seeds), losses, torch.stack(known) if len(known) == len(said) else None)
