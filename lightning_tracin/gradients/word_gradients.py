"""Gradients at the word embedding table: one row for each word of each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import DirectedRows
from lightning_tracin.gradients.rows import projected, unit_rows


@dataclass(frozen=True)
class WordGradients(DirectedRows):
    """Gradients of ``n_examples`` losses at the word embedding table: one row for each word of each example.

    Attributes:
        tokens: (R,) int64, the token id of each row. No (example, token) pair occurs twice.
    """

    KIND: ClassVar[str] = "words"
    SORTED_BY: ClassVar[tuple[str, ...]] = ("tokens",)

    tokens: Tensor = field(kw_only=True)

    @classmethod
    def from_positions(cls, n_examples: int, examples: Tensor, tokens: Tensor, gradients: Tensor) -> WordGradients:
        """Sum the gradients at the embedding's output over positions, into one row for each word of each example.

        Args:
            n_examples: number of examples in the batch.
            examples: (P,) the example of each position.
            tokens: (P,) the token id at each position.
            gradients: (P, H) the gradient at each position. Words with a sum of zero are left out.
        """
        keys, row_of_position = torch.unique(tokens * n_examples + examples, return_inverse=True)
        rows = torch.zeros(len(keys), gradients.shape[1], device=gradients.device, dtype=torch.float32)
        rows.index_add_(0, row_of_position, gradients.float())
        norms, directions = unit_rows(rows)
        words = cls(n_examples, keys % n_examples, norms, directions, tokens=keys // n_examples)
        return words if bool((norms != 0).all()) else words.select(norms != 0)

    def minus(self, others: WordGradients) -> WordGradients:
        """The gradients of these losses minus others of the same examples."""
        rows = [each.directions * each.norms[:, None] for each in (self, others)]
        examples, tokens = (torch.cat([getattr(self, name), getattr(others, name)]) for name in ("examples", "tokens"))
        return WordGradients.from_positions(self.n_examples, examples, tokens, torch.cat([rows[0], -rows[1]]))

    def projected(self, size: int) -> WordGradients:
        """The same gradients with unit directions of ``size`` numbers, by random projection; norms stay as they are."""
        _, directions = unit_rows(projected(self.directions, size))
        return replace(self, directions=directions)

    def without(self, tokens: Sequence[int]) -> WordGradients:
        """The same gradients with norms of zero for some tokens; directions are not copied."""
        is_excluded = torch.isin(self.tokens, torch.tensor(list(tokens)))
        return replace(self, norms=torch.where(is_excluded, 0.0, self.norms))

    def top_words(self, k: int) -> WordGradients:
        """Each example's ``k`` rows of largest norm; of equal norms, those of smaller token ids."""
        by_norm = torch.argsort(self.norms, descending=True, stable=True)
        order = by_norm[torch.argsort(self.examples[by_norm], stable=True)]
        counts = self.rows_by_example()
        rank = torch.arange(len(order)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return self.select(torch.sort(order[rank < k]).values)
