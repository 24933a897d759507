"""PortableResult: a result that takes along what it lists, and the review of the training examples' labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_tracin.checked_numbers import whole_number, whole_number_or_none
from lightning_tracin.report.explanation import Example
from lightning_tracin.report.label_issues import LabelIssues
from lightning_tracin.results.evidence import Evidence
from lightning_tracin.results.excerpt import LISTED_SUSPECTS, LISTED_WORDS, Excerpt, PairTerms, TokenTerms
from lightning_tracin.results.excluded_words import with_ids_of
from lightning_tracin.results.explained_result import CHUNK, ExplainedResult
from lightning_tracin.results.label_table import label_issues_of, review_method
from lightning_tracin.results.listing import Entry
from lightning_tracin.results.notes import notes_of_trace, notes_of_words
from lightning_tracin.results.packed_examples import PackedExamples
from lightning_tracin.scoring.label_review import reviewed_labels
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import method_of, require_not_constant

_MOST_CELLS = 4_000_000  # A word table of more, as with thousands of classes and labels, stays with the trace.


@dataclass(repr=False, eq=False)
class PortableResult(ExplainedResult):
    """A result whose file can be read anywhere."""

    def save(self, path: str | Path, k: int = 20) -> Path:
        """Write the result to one safetensors file, which can be read anywhere, also without the trace.

        The file holds the scores, and of the k strongest proponents and opponents of each test example what the trace
        and :meth:`with_texts` tell of them: texts, labels, and the terms of words; suspected labels and the word table,
        too. With the trace at hand a loaded result goes beyond that. The file keeps its place, absolute and relative.

        Args:
            path: the file, usually ``*.safetensors``.
            k: how many of each; fewer where fewer were kept. With 0 the file holds scores alone, and nothing is read.

        Returns:
            The path.

        Raises:
            ValueError: if k is negative.

        Warns:
            UserWarning: the trace is not at hand, so that the file has no texts, labels and words.
        """
        k = whole_number("k", k, at_least=0)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        excerpt = self._excerpted(k) if k else None
        if k and excerpt is None:
            rank_zero_warn(
                f"{path} holds scores alone: the trace that they were computed from"
                f"{'' if self.trace is None else f', {self.trace.path},'} is not at hand, so that texts, labels and "
                "words of training examples are missing. Load the result where its trace is."
            )
        return replace(self, excerpt=excerpt).write(path)

    def label_issues(self, method: str | Method | None = None, *, n: int | None = None) -> LabelIssues:
        """Training examples whose labels may be wrong, by self-influence; see :func:`lightning_tracin.label_issues`.

        Args:
            method: measures self-influence; by default "tracin-last" where the trace has its gradients, else that of
                this result, without normalisation where that makes it the same for all.
            n: list only so many, those of highest self-influence.

        Raises:
            ValueError: if the fit did not record what the method needs, if its self-influence is constant, or if n is
                under 0.
            FileNotFoundError: if the trace is gone, and the file of the result holds no review by this method.
        """
        n = whole_number_or_none("n", n, at_least=0)
        evidence = Evidence.find(self)
        chosen = None if method is None else method_of(method)
        if evidence is None and self.excerpt is not None and chosen in (None, self.excerpt.review_method):
            by, review = self.excerpt.review_method, self.excerpt.review
        else:
            evidence = Evidence.require(self)
            by = chosen or review_method(evidence.checkpoints, self.method)
            require_not_constant(by)
            by = with_ids_of(by, evidence.trace, evidence.checkpoints, self.tokenizer)
            review = reviewed_labels(evidence.trace, evidence.checkpoints, by)
        return label_issues_of(review, by, self._reader, partial(self._examples_in, evidence), n)

    def _excerpted(self, k: int) -> Excerpt | None:
        """What a file of this result holds of the trace; where that is gone, what the result was loaded with."""
        evidence, held = Evidence.find(self), self.excerpt
        tests = PackedExamples.of((row, self._test_example(row)) for row in range(len(self.test_indices)))
        if evidence is None:
            if held is None:
                return None
            written = PackedExamples.of((index, self._as_written(example)) for index, example in held.train.items())
            return replace(held, tests=tests, train=written)
        k = min(k, self._n_kept)
        rows = range(len(self.test_indices))
        entries = {row: [*both[0], *both[1]] for row, both in self._listed(evidence, rows, k).items()}
        by = review_method(evidence.checkpoints, self.method)
        review = reviewed_labels(evidence.trace, evidence.checkpoints, by)
        table = self._word_table(evidence, LISTED_WORDS, 0) if self._has_words else None
        shown = {index for of_row in entries.values() for each in of_row for index in (each.index, *each.equal)}
        shown |= set(review.order[:LISTED_SUSPECTS].tolist())
        return Excerpt(
            k=k,
            tests=tests,
            train=PackedExamples.of(self._train_of(evidence, sorted(shown))),
            terms=PairTerms.of(_terms_by_row(evidence, entries)) if self._has_words else None,
            review=review,
            review_method=by,
            word_table=table if table is not None and table.values.numel() <= _MOST_CELLS else None,
            notes=[
                *notes_of_trace(evidence),
                *notes_of_words(evidence, self._first_explanations(evidence), self.words_of_ids),
            ],
        )

    def _train_of(self, evidence: Evidence, indices: Sequence[int]) -> Iterator[tuple[int, Example]]:
        """Training examples by index, some at a time, so that memory does not grow with their number."""
        for start in range(0, len(indices), 8 * CHUNK):
            yield from self._examples_in(evidence, indices[start : start + 8 * CHUNK]).items()


def _terms_by_row(evidence: Evidence, entries: Mapping[int, Sequence[Entry]]) -> Iterator[dict[int, TokenTerms]]:
    """The terms of the pairs of each row with what is listed for it."""
    rows = list(entries)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        found = evidence.terms_of_pairs({row: [each.index for each in entries[row]] for row in chunk})
        yield from (found[row] for row in chunk)
