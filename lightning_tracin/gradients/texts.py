"""The texts of a block's examples: token ids and labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged

#: Marks of tokens without a label of their own: of the only or first text, and of the second of two.
NO_LABEL, IN_SECOND = -1, -2

#: Sets of more labels do not fit into the 53 bits of a float64.
MOST_LABELS = 53


@dataclass(frozen=True)
class Texts(Ragged):
    """The token ids of a block's examples, in reading order, and their labels.

    Attributes:
        ids: (R,) int64, token ids.
        labels: (n_examples,) float64; NaN for an example whose label is missing or is not one number.
        marks: (R,) int64, the label at each token, where labels are of tokens and count there; else ``NO_LABEL``, or
            ``IN_SECOND`` for a token of the second of two texts. All ``NO_LABEL`` if it is not known.
        label_sets: (n_examples,) float64, the labels of an example that has a set of them, as the sum of the powers of
            two of their numbers (:func:`label_sets_of`); NaN for others.
    """

    KIND: ClassVar[str] = "texts"
    PER_EXAMPLE: ClassVar[frozenset[str]] = frozenset({"labels", "label_sets"})

    ids: Tensor
    labels: Tensor
    marks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    label_sets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def __post_init__(self) -> None:
        """Fill in what traces and results of earlier versions have not."""
        if len(self.marks) != len(self.ids):
            object.__setattr__(self, "marks", torch.full_like(self.ids, NO_LABEL))
        if len(self.label_sets) != len(self.labels):
            object.__setattr__(self, "label_sets", torch.full_like(self.labels, torch.nan))

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

    def marks_of(self, example: int) -> list[int]:
        """The mark of each of one example's token ids."""
        return self.marks[self.examples == example].tolist()

    def marks_by_example(self) -> list[list[int]]:
        """The marks of every example's token ids; rows must be sorted by example."""
        return [marks.tolist() for marks in torch.split(self.marks, self.rows_by_example().tolist())]

    def label_of(self, example: int) -> float | None:
        """One example's label; None if it has none."""
        label = float(self.labels[example])
        return None if math.isnan(label) else label

    def label_set_of(self, example: int) -> tuple[int, ...] | None:
        """The numbers of one example's labels, ascending; None if it has no set of them."""
        packed = float(self.label_sets[example])
        return None if math.isnan(packed) else tuple(at for at in range(MOST_LABELS) if int(packed) >> at & 1)


def label_numbers_of(labels: Tensor | None, n_examples: int) -> Tensor:
    """(n_examples,) float64, labels that are one number for each example, (n_examples,) or (n_examples, 1); else NaN.

    Example:
        >>> label_numbers_of(torch.tensor([[True], [False]]), 2)
        tensor([1., 0.], dtype=torch.float64)
    """
    if labels is None or labels.shape not in ((n_examples,), (n_examples, 1)):
        return torch.full((n_examples,), torch.nan, dtype=torch.float64)
    return labels.detach().cpu().double().reshape(-1)


def label_sets_of(labels: Tensor | None, n_examples: int) -> Tensor:
    """(n_examples,) float64, sets of labels as numbers, of labels (n_examples, C) that are all 0 or 1; else NaN.

    A single column is no set but one label for each example.

    Example:
        >>> label_sets_of(torch.tensor([[0, 1, 1], [0, 0, 0]]), 2)
        tensor([6., 0.], dtype=torch.float64)
    """
    nothing = torch.full((n_examples,), torch.nan, dtype=torch.float64)
    if labels is None or labels.dim() != 2 or len(labels) != n_examples or not 1 < labels.shape[1] <= MOST_LABELS:
        return nothing
    values = labels.detach().cpu().double()
    if not bool(((values == 0) | (values == 1)).all()):
        return nothing
    return values @ 2.0 ** torch.arange(labels.shape[1], dtype=torch.float64)
