"""ExplainedResult: what the scores mean in words, read of the trace when it is asked for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import index_of, whole_number, whole_number_or_none
from lightning_tracin.report.explanation import Example, Explanation, Influential
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.evidence import Evidence
from lightning_tracin.results.excerpt import TokenTerms, first_words
from lightning_tracin.results.listing import Entry, Sides, TextKeys, listed
from lightning_tracin.results.ranked_result import RankedResult
from lightning_tracin.results.reader import RawText, Reader, require_texts
from lightning_tracin.results.rows import checked_row
from lightning_tracin.results.train_examples import train_examples
from lightning_tracin.results.word_sums import groups_of, word_table_of
from lightning_tracin.results.words import shares_of_words
from lightning_tracin.scoring.methods import word_part
from lightning_tracin.scoring.naming import require_not_constant
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.scoring.ridge_scores import self_influence_of
from lightning_tracin.storage.scratch import Scratch

if TYPE_CHECKING:
    from typing_extensions import Self

_PRINTED_TESTS = 3  # print(result) shows this many test examples.

_PRINTED_K = 3  # Of each it shows this many proponents, and as many opponents.

CHUNK = 32  # The pairs of this many test examples are explained at once, so memory does not grow with their number.


@dataclass(repr=False, eq=False)
class ExplainedResult(RankedResult):
    """A result whose pairs are explained: by the texts and labels of the examples, and by the words that they share.

    Attributes:
        tokenizer: what turns token ids into words again; without one, pieces are shown as they are.
        raw_test: the texts of the test examples as they were before the tokenizer (:meth:`with_texts`); by the name of
            their loader, where there are several.
        raw_train: those of the training examples.
        scratch: has the temporary files that test gradients may lie in, and keeps them as long as the result.
    """

    tokenizer: Any = None
    raw_test: Sequence[RawText] | Mapping[str, Sequence[RawText]] | None = None
    raw_train: Sequence[RawText] | None = None
    scratch: Scratch | None = None

    def with_texts(
        self,
        train: Sequence[RawText] | None = None,
        test: Sequence[RawText] | Mapping[str, Sequence[RawText]] | None = None,
        *,
        tokenizer: Any = None,
    ) -> Self:
        """The same result, shown in the raw texts' own case, spelling and spaces.

        Without them, examples are put together again from their tokens. Those that it has already stay where none are
        given.

        Args:
            train: the text of each training example, or a pair of texts, by index in the training data set.
            test: the same of the test data set; where test examples came in several loaders, by the name of theirs.
            tokenizer: the fast tokenizer that made the token ids; by default the one that was found on the module or
                its datamodule when influence was computed.

        Raises:
            TypeError: if what is given are no texts.
            ValueError: if there is no tokenizer that tells offsets, or not a text for each example.
        """
        tokenizer = tokenizer or self.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "with_texts needs the fast tokenizer that made the token ids, to find the tokens in the texts, but got "
                f"{type(tokenizer).__name__}. Pass tokenizer=...; where words are split by other means, the result "
                "shows those of influence_words without with_texts."
            )
        if train is not None:
            require_texts("train", train, self.n_train)
        if test is not None:
            self._require_test_texts(test)
        return replace(
            self,
            tokenizer=tokenizer,
            raw_train=self.raw_train if train is None else train,
            raw_test=self.raw_test if test is None else test,
        )

    def explanations(self, test_indices: Sequence[int] | None = None, k: int = 5) -> Iterator[Explanation]:
        """Test examples and their k strongest proponents and opponents, in words.

        Proponents have positive scores, opponents negative ones. Training examples with the same token ids and label
        are one entry.

        Args:
            test_indices: rows of the scores; all by default.
            k: how many of each; fewer where fewer were kept, or where no more of them pushed.

        Raises:
            IndexError: if there is no such row.
            ValueError: if ``k`` is no whole number of at least 1.
        """
        k = whole_number("k", k)
        asked = range(len(self.test_indices)) if test_indices is None else test_indices
        rows = [checked_row(each, self.test_indices) for each in asked]
        return self._explanations_from(Evidence.find(self), rows, k)

    def words(self, test_index: int, train_index: int) -> list[tuple[str, float]]:
        """The term of each shared word in a pair's score (Yeh et al. 2022, section 4).

        The pieces of a word are put together; of a word that is not shared whole, what is not becomes "…", as in "£…"
        for the £900 of a training example whose test example holds £800. A token that the training example holds more
        than once, or in several of its words, has one term, which is divided equally among its occurrences. Words that
        print alike are one entry; all add up to the pair's score.

        Args:
            test_index: row of the scores.
            train_index: index in the training data set.

        Returns:
            (word, term), strongest magnitude first.

        Raises:
            ValueError: if the method is not TracIn-WE.
            IndexError: if there is no such row, or no such training example.
            FileNotFoundError: if the trace that the scores were computed from is gone, and the pair is none of those
                that the file of the result holds.
        """
        row, index = checked_row(test_index, self.test_indices), index_of(train_index)
        if index is None or not 0 <= index < self.n_train:
            raise IndexError(f"There are training examples 0 to {self.n_train - 1}, but got {train_index!r}.")
        self._require_words()
        (named,) = self._named_terms(row, [index])
        return sorted(named.items(), key=lambda word: -abs(word[1]))

    def word_table(self, n: int | None = 50, *, min_examples: int = 0) -> WordTable:
        """What each word of the training examples adds to the scores of all test examples, by class and label.

        It is summed over all pairs, also where only the k strongest were kept, in one pass over the stored gradients.
        Words are put together of their pieces as in :meth:`words`; raw texts are not used.

        Args:
            n: how many words, strongest first; None for all.
            min_examples: leave out words that fewer training examples hold.

        Returns:
            A table to print, or to take numbers from. Test examples are grouped by what the model says of them, or by
            their labels where that is not known. A positive influence speaks for the target of the test examples: for
            ``target="label"`` that is their own label, also where the model says another class.

        Raises:
            ValueError: if the method is not TracIn-WE, ``n`` is under 1, or ``min_examples`` under 0.
            FileNotFoundError: if the trace that the scores were computed from is gone, and the file of the result holds
                fewer words.
        """
        n, min_examples = whole_number_or_none("n", n), whole_number("min_examples", min_examples, at_least=0)
        self._require_words()
        evidence = Evidence.find(self)
        if evidence is None and self.excerpt is not None and self.excerpt.word_table is not None:
            return first_words(self.excerpt.word_table, n, min_examples)
        return self._word_table(evidence or Evidence.require(self), n, min_examples)

    def self_influence(self) -> Tensor:
        """Every training example's influence on itself: high for mislabelled and for atypical examples.

        Returns:
            (n_train,) float32, by the method and the checkpoints of this result.

        Raises:
            ValueError: if it is the same for every example, as with ``normalize="cosine"``.
            FileNotFoundError: if the trace that the scores were computed from is gone, and the file of the result holds
                that of another method.
        """
        require_not_constant(self.method)
        evidence = Evidence.find(self)
        if evidence is None and self.excerpt is not None and self.excerpt.review_method == self.method:
            return self.excerpt.review.self_influence
        return self_influence_of(Evidence.require(self).checkpoints, self.method)

    @property
    def _has_words(self) -> bool:
        """Whether the method has word terms."""
        return word_part(self.method) is not None

    def _require_words(self) -> None:
        """Check that the method has word terms."""
        if not self._has_words:
            inside = f" Ask by {self.method.method} for words." if isinstance(self.method, TracInRidge) else ""
            raise ValueError(
                f"{self.method} has no word terms: they are a property of the word embedding layer (TracInWE).{inside}"
            )

    def _explanations_from(self, evidence: Evidence | None, rows: Sequence[int], k: int) -> Iterator[Explanation]:
        """Explanations without texts of training examples where there is no evidence, nor terms of words."""
        for start in range(0, len(rows), CHUNK):
            listed = self._listed(evidence, rows[start : start + CHUNK], k)
            pairs = {row: [entry.index for side in sides for entry in side] for row, sides in listed.items()}
            examples = self._examples_in(evidence, sorted({index for of_row in pairs.values() for index in of_row}))
            terms = self._terms_of_pairs(evidence, pairs)
            for row, sides in listed.items():
                yield self._explanation(row, sides, examples, terms.get(row, {}))

    def _terms_of_pairs(
        self, evidence: Evidence | None, pairs: Mapping[int, Sequence[int]]
    ) -> dict[int, dict[int, TokenTerms]]:
        """The terms of pairs, by row and training example: as the evidence has them, or as far as an excerpt does."""
        if not self._has_words:
            return {}
        if evidence is not None:
            return evidence.terms_of_pairs(pairs)
        if self.excerpt is None or self.excerpt.terms is None:
            return {}
        return {row: self.excerpt.terms.of_row(row) for row in pairs}

    def _listed(self, evidence: Evidence | None, rows: Sequence[int], k: int) -> dict[int, Sides]:
        """The k strongest proponents and opponents of test examples that say something else, by row."""
        held = {} if self.excerpt is None else self.excerpt.train
        keys = TextKeys(held if evidence is None else evidence.trace)
        return listed(min(k, self._n_kept), rows, self._pushing, keys)

    def _first_explanations(self, evidence: Evidence | None) -> list[Explanation]:
        """Those that ``print(result)`` shows."""
        shown = range(min(_PRINTED_TESTS, len(self.test_indices)))
        return list(self._explanations_from(evidence, shown, _PRINTED_K))

    def _named_terms(self, row: int, train_indices: Sequence[int]) -> list[dict[str, float]]:
        """What each word adds to the score of a test example with each of some training examples.

        A token that a training example held at a checkpoint but not when its text was stored, as where a collate
        function masks at random, stands for itself.
        """
        evidence = Evidence.find(self)
        terms = self._terms_of_pairs(evidence, {row: train_indices}).get(row, {})
        if not terms.keys() >= set(train_indices):
            evidence = Evidence.require(self)
        examples = self._examples_in(evidence, train_indices)
        found: list[dict[str, float]] = []
        for index in train_indices:
            example, of_tokens = examples[index], terms[index]
            named: dict[str, float] = defaultdict(float)
            shares = shares_of_words(example.words, example.ids, of_tokens)
            parts, _ = self._reader.parts(example, of_tokens)
            for word, part, share in zip(example.words, parts, shares, strict=True):
                if any(example.ids[place] in of_tokens for place in word.places):
                    named[part] += share
            for token, term in of_tokens.items():
                if token not in example.ids:
                    named[self._reader.token(token)] += term
            found.append(named)
        return found

    def _word_table(self, evidence: Evidence, n: int | None, min_examples: int) -> WordTable:
        """The word table; its classes are what the model says of test examples, or their labels if that is unknown."""
        said, confidence = self.predictions.T
        values = torch.where(torch.isnan(confidence), self.test_texts.labels, said)
        classes = groups_of(values, self._reader.label)
        table = word_table_of(evidence, classes, self._reader, n=n, min_examples=min_examples)
        return replace(table, target=self.target)

    def _explanation(
        self, row: int, sides: Sides, examples: Mapping[int, Example], terms: Mapping[int, TokenTerms]
    ) -> Explanation:
        """The explanation of one test example.

        Args:
            row: its row of the scores.
            sides: its proponents and its opponents.
            examples: what training examples say, by index.
            terms: of its pair with each training example; empty where there are none.
        """
        proponents, opponents = (
            tuple(self._influential(row, entry, examples[entry.index], terms.get(entry.index)) for entry in side)
            for side in sides
        )
        summed: TokenTerms = defaultdict(float)
        for influential in proponents:
            for token, term in terms.get(influential.example.index, {}).items():
                summed[token] += term
        test = self._test_example(row)
        of_words = tuple(shares_of_words(test.words, test.ids, summed)) if terms else ()
        return Explanation(row, test, of_words, proponents, opponents)

    def _influential(self, row: int, entry: Entry, example: Example, terms: TokenTerms | None) -> Influential:
        """A training example that pushed a test example, with the terms of its words where those are known."""
        share = self._share(row, entry.total)
        if terms is None:
            return Influential(example, entry.score, share, equal=entry.equal)
        of_words = tuple(shares_of_words(example.words, example.ids, terms))
        parts, stops = self._reader.parts(example, terms)
        return Influential(example, entry.score, share, of_words, parts, stops, entry.equal)

    def _require_test_texts(self, test: Sequence[RawText] | Mapping[str, Sequence[RawText]]) -> None:
        """Check that there is a text for each test example, by the name of its loader where there are several."""
        names = self.test_loader_names
        by_name = test if isinstance(test, Mapping) else {"": test}
        if not by_name.keys() <= set(names or ("",)):
            wanted = f"map names of {names} to texts" if names else "be a list of texts"
            got = f"{type(test).__name__} with {list(test)}" if isinstance(test, Mapping) else type(test).__name__
            raise ValueError(f"test must {wanted}, as its examples came in {len(names) or 1} loader, but got {got}.")
        for name, texts in by_name.items():
            own = self.test_indices if not names else self.test_indices[self.test_loaders == names.index(name)]
            require_texts(f"test[{name!r}]" if names else "test", texts, int(own.max()) + 1)

    def _test_example(self, row: int) -> Example:
        """What a test example says, and what the model says of it."""
        prediction, confidence = (None if math.isnan(each) else each for each in self.predictions[row].tolist())
        if self.raw_test is None and self.excerpt is not None:
            return self.excerpt.tests[row]
        loader, texts = self._loader_of(row), self.test_texts
        example = self._reader.example(
            int(self.test_indices[row]),
            texts.ids_of(row),
            texts.label_of(row),
            self.raw_test.get(loader or "") if isinstance(self.raw_test, Mapping) else self.raw_test,
            marks=texts.marks_of(row),
            label_set=texts.label_set_of(row),
            prediction=prediction,
            confidence=confidence,
        )
        return replace(example, loader=loader, target=self.target_names[row] if self.target_names else None)

    def _examples_in(self, evidence: Evidence | None, indices: Sequence[int]) -> dict[int, Example]:
        """What training examples say, by index, as an excerpt or the evidence has it; nothing where there is none."""
        held = {} if self.excerpt is None else self.excerpt.train
        found = {index: self._as_written(held[index]) for index in indices if index in held}
        others = [index for index in indices if index not in found]
        if evidence is None or not others:
            return found | {index: Example(index, (), None) for index in others}
        return found | train_examples(evidence.trace, others, self._reader, self.raw_train)

    def _as_written(self, example: Example) -> Example:
        """A training example of an excerpt, as the raw texts spell it if they were given since."""
        return example if self.raw_train is None else self._reader.respelled(example, self.raw_train[example.index])

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.words_of_ids, self.label_names, self.tokenizer, frozenset(self.common_tokens.tolist()))
