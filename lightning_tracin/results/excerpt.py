"""Excerpt: what a saved result holds of its trace, so that what it lists can be read anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.packed_examples import PackedExamples
from lightning_tracin.scoring.label_review import LabelReview
from lightning_tracin.scoring.methods import Method

#: So many suspected labels, and words over the whole test set, are listed on a page and in a file.
LISTED_SUSPECTS, LISTED_WORDS = 50, 200

#: What each token id that a pair of examples shares adds to the pair's score.
TokenTerms: TypeAlias = dict[int, float]


@dataclass(frozen=True)
class PairTerms:
    """The word terms of some pairs of a test and a training example, in the order of rows.

    Attributes:
        first: (n_test + 1,) int64, where the pairs of each row of the scores begin.
        indices: (n_pairs,) int64, the training example of each pair, ascending in each row.
        offsets: (n_pairs + 1,) int64, where the terms of each pair begin.
        tokens: (n_terms,) int32, the token id of each term.
        values: (n_terms,) float64.
    """

    first: Tensor
    indices: Tensor
    offsets: Tensor
    tokens: Tensor
    values: Tensor

    @classmethod
    def of(cls, terms: Iterable[Mapping[int, TokenTerms]]) -> PairTerms:
        """Terms of the pairs of each row, by training example."""
        pairs_of_row, indices, sizes, tokens, values = [0], list[int](), [0], list[Tensor](), list[Tensor]()
        for of_row in terms:
            for index in sorted(of_row):
                indices.append(index)
                sizes.append(len(of_row[index]))
                tokens.append(torch.tensor([*of_row[index]], dtype=torch.int32))
                values.append(torch.tensor([*of_row[index].values()], dtype=torch.float64))
            pairs_of_row.append(len(indices))
        return cls(
            torch.tensor(pairs_of_row),
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor(sizes).cumsum(0),
            torch.cat([torch.empty(0, dtype=torch.int32), *tokens]),
            torch.cat([torch.empty(0, dtype=torch.float64), *values]),
        )

    def of_row(self, row: int) -> dict[int, TokenTerms]:
        """The terms of a row's pairs, by training example."""
        start, stop = self.first[row : row + 2].tolist()
        offsets = self.offsets[start : stop + 1].tolist()
        tokens, values = (each[offsets[0] : offsets[-1]].tolist() for each in (self.tokens, self.values))
        found: dict[int, TokenTerms] = {}
        for pair, index in enumerate(self.indices[start:stop].tolist()):
            own = slice(offsets[pair] - offsets[0], offsets[pair + 1] - offsets[0])
            found[index] = dict(zip(tokens[own], values[own], strict=True))
        return found


@dataclass(frozen=True)
class Excerpt:
    """What a saved result holds of its trace.

    Attributes:
        k: how many proponents and opponents of each test example it covers.
        tests: what each test example says, by row of the scores.
        train: what training examples say, by index: those that are listed, and suspects.
        terms: of the words of each pair; None for a method without words.
        review: of the training examples' labels.
        review_method: measured their self-influence.
        word_table: the strongest words over the whole test set; None for a method without words.
        notes: what the trace says that the scores lack.
    """

    k: int
    tests: PackedExamples
    train: PackedExamples
    terms: PairTerms | None
    review: LabelReview
    review_method: Method
    word_table: WordTable | None
    notes: Sequence[str]


def first_words(table: WordTable, n: int | None, min_examples: int) -> WordTable:
    """The first words of the table that a file holds.

    Raises:
        FileNotFoundError: if others are asked for than it holds, which only the trace tells.
    """
    n_words = len(table.words)
    if min_examples or ((n is None or n > n_words) and table.n_left):
        raise FileNotFoundError(
            f"The trace that these scores were computed from is gone, and the file of the result holds the {n_words} "
            f"strongest words alone: ask word_table for at most as many, without min_examples, or load the result "
            "where its trace is."
        )
    shown = n_words if n is None else min(n, n_words)
    return replace(
        table,
        words=table.words[:shown],
        special=table.special[:shown],
        common=table.common[:shown],
        values=table.values[:shown],
        examples=table.examples[:shown],
        n_left=table.n_left + n_words - shown,
    )
