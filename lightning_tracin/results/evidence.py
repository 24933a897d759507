"""Evidence: what a result's scores were computed from, as far as it is still there, and the terms read from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.results.excerpt import TokenTerms
from lightning_tracin.results.stored_result import StoredResult, left_without_trace
from lightning_tracin.scoring.methods import Method, TracInWE
from lightning_tracin.scoring.terms import Term, terms_at
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.trace import Trace


@dataclass(frozen=True)
class Evidence:
    """What scores were computed from.

    The list of checkpoints is read from the trace's folder when evidence is looked for, and another fit may replace
    them at any time: look for it once for each question, and do not keep it.

    Attributes:
        trace: has the training examples' texts.
        checkpoints: those that the scores are sums over, in their order.
        method: what the scores are.
        test_gradients: the prepared gradients of each block of test examples at each checkpoint, which word terms are
            products of; none for a method without words.
    """

    trace: Trace
    checkpoints: Sequence[Checkpoint]
    method: Method
    test_gradients: Sequence[Sequence[WordGradients]]

    @classmethod
    def find(cls, result: StoredResult) -> Evidence | None:
        """The evidence of a result; None if it has no trace, or if another fit has replaced its checkpoints."""
        if result.trace is None:
            return None
        stored = {checkpoint.id: checkpoint for checkpoint in result.trace.checkpoints}
        if not stored.keys() >= set(result.checkpoint_ids):
            return None
        checkpoints = [stored[each] for each in result.checkpoint_ids]
        return cls(result.trace, checkpoints, result.method, result.test_gradients)

    @classmethod
    def require(cls, result: StoredResult) -> Evidence:
        """The evidence of a result.

        Raises:
            FileNotFoundError: if it is gone; the message says what is left.
        """
        evidence = cls.find(result)
        if evidence is None:
            raise FileNotFoundError(
                "The trace that these scores were computed from is gone, or another fit took its place, and "
                f"{left_without_trace(result.excerpt)}. Load the result where its trace is, or with trace=...."
            )
        return evidence

    @cached_property
    def word_terms(self) -> list[Term]:
        """The method's term at the word embedding table, for each checkpoint."""
        terms = (term for checkpoint in self.checkpoints for term in terms_at(checkpoint, self.method))
        return [term for term in terms if isinstance(term.method, TracInWE)]

    def terms_of_pairs(self, pairs: Mapping[int, Sequence[int]]) -> dict[int, dict[int, TokenTerms]]:
        """The terms that the scores of pairs are sums of, summed over the checkpoints.

        The stored gradients of all training examples that are asked for are read once for each checkpoint.

        Args:
            pairs: for each row of the scores, the indices of training examples.

        Returns:
            For each row and each of its training examples, the term of each token id that the two share.
        """
        wanted = sorted({index for of_row in pairs.values() for index in of_row})
        place_of = {index: place for place, index in enumerate(wanted)}
        terms: dict[int, dict[int, TokenTerms]] = {
            row: {index: defaultdict(float) for index in of_row} for row, of_row in pairs.items()
        }
        for checkpoint, term in enumerate(self.word_terms if wanted else ()):
            assert isinstance(term.method, TracInWE)
            train = term.prepared_training(term.shards.read_examples(wanted))
            for row, of_row in pairs.items():
                is_paired = torch.zeros(len(wanted), dtype=torch.bool)
                is_paired[[place_of[index] for index in of_row]] = True
                test = self._test_gradients_of(row, checkpoint)
                term.require_same_layer(test, train)
                columns = term.method.terms(test, train.select(is_paired[train.examples]))
                for place, token, value in zip(*(column.tolist() for column in columns), strict=True):
                    terms[row][wanted[place]][token] += term.weight * value
        return terms

    def _test_gradients_of(self, row: int, checkpoint: int) -> WordGradients:
        """The prepared gradients of one test example at a checkpoint, which is counted from 0."""
        for of_block in self.test_gradients:
            gradients = of_block[checkpoint]
            if row < gradients.n_examples:
                return gradients.slice(row, row + 1)
            row -= gradients.n_examples
        raise IndexError(row)
