"""What the examples of a block say: token ids and labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged


@dataclass(frozen=True)
class Texts(Ragged):
    """What the examples of a block say: their token ids, in reading order, and their labels.

    Attributes:
        ids: (R,) int64, token ids.
        labels: (n_examples,) float64, NaN for an example that has not one number as its label.
    """

    KIND: ClassVar[str] = "texts"
    PER_EXAMPLE: ClassVar[frozenset[str]] = frozenset({"labels"})

    ids: Tensor
    labels: Tensor

    @classmethod
    def empty(cls, n_examples: int) -> Texts:
        """Examples that say nothing."""
        none = torch.empty(0, dtype=torch.long)
        return cls(n_examples, none, none, torch.full((n_examples,), torch.nan, dtype=torch.float64))

    def equals(self, other: Texts) -> bool:
        """Whether both say the same."""
        labels = torch.equal(self.labels.nan_to_num(), other.labels.nan_to_num())
        return labels and torch.equal(self.examples, other.examples) and torch.equal(self.ids, other.ids)

    def ids_of(self, example: int) -> list[int]:
        """One example's token ids."""
        return self.ids[self.examples == example].tolist()

    def ids_by_example(self) -> list[list[int]]:
        """Every example's token ids."""
        return [ids.tolist() for ids in torch.split(self.ids, self.rows_by_example().tolist())]

    def label_of(self, example: int) -> float | None:
        """One example's label; None where it has none."""
        label = float(self.labels[example])
        return None if math.isnan(label) else label
