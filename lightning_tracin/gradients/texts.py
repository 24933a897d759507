"""The texts of a block's examples: token ids and labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged


@dataclass(frozen=True)
class Texts(Ragged):
    """The token ids of a block's examples, in reading order, and their labels.

    Attributes:
        ids: (R,) int64, token ids.
        labels: (n_examples,) float64; NaN for an example whose label is missing or is not one number.
    """

    KIND: ClassVar[str] = "texts"
    PER_EXAMPLE: ClassVar[frozenset[str]] = frozenset({"labels"})

    ids: Tensor
    labels: Tensor

    @classmethod
    def empty(cls, n_examples: int) -> Texts:
        """Examples without token ids and labels."""
        no_rows = torch.empty(0, dtype=torch.long)
        return cls(n_examples, no_rows, no_rows, torch.full((n_examples,), torch.nan, dtype=torch.float64))

    def equals(self, other: Texts) -> bool:
        """Whether both have the same token ids and labels."""
        same_labels = torch.equal(self.labels.nan_to_num(), other.labels.nan_to_num())
        return same_labels and torch.equal(self.examples, other.examples) and torch.equal(self.ids, other.ids)

    def ids_of(self, example: int) -> list[int]:
        """One example's token ids."""
        return self.ids[self.examples == example].tolist()

    def ids_by_example(self) -> list[list[int]]:
        """Every example's token ids; rows must be sorted by example."""
        return [ids.tolist() for ids in torch.split(self.ids, self.rows_by_example().tolist())]

    def label_of(self, example: int) -> float | None:
        """One example's label; None if it has none."""
        label = float(self.labels[example])
        return None if math.isnan(label) else label
