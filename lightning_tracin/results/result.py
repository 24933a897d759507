"""InfluenceResult: the scores, the strongest examples, and the words behind them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.report.explanation import Example, Explanation, Influential
from lightning_tracin.report.page import Page, counts_of, notes_of, write_page
from lightning_tracin.report.plots import Kind, check_plot, plot_labels, plot_scores, plot_self_influence, plot_words
from lightning_tracin.report.rich_repr import RichRepr, data_frame
from lightning_tracin.report.tables import explained
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.reader import RawText, Reader
from lightning_tracin.results.stored_result import StoredResult
from lightning_tracin.results.word_sums import groups_of, word_table_of
from lightning_tracin.results.words import shares_of_words
from lightning_tracin.scoring.methods import Method, word_part
from lightning_tracin.scoring.naming import described, is_constant_on_itself, without_normalizing
from lightning_tracin.scoring.self_influence import self_influences
from lightning_tracin.scoring.strongest import TopK, clipped_k, strongest
from lightning_tracin.scoring.terms import Term, terms_at
from lightning_tracin.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRINTED_TESTS = 3

_PRINTED_K = 3

_PAGE_WORDS = 200  # of the word table of an HTML page

_CHUNK = 32  # test examples whose pairs are explained at once


@dataclass(repr=False, eq=False)
class InfluenceResult(RichRepr, StoredResult):
    """How much each training example pushed the model's loss on each test example.

    A positive score belongs to a proponent (training on it lowered the test example's loss), a negative one to an
    opponent. Training examples are numbered by their index in the training data set. ``print(result)`` shows a table.

    Attributes:
        scores: (n_test, n_train) float32, or None if only the k strongest were kept.
        tokenizer: what turns token ids into words again; without one, pieces are shown as they are.
        raw_test: the texts of the test examples as they were before the tokenizer (:meth:`with_texts`).
        raw_train: those of the training examples.

    The others are those of :class:`~lightning_tracin.results.stored_result.StoredResult`.
    """

    tokenizer: Any = None
    raw_test: Sequence[RawText] | None = None
    raw_train: Sequence[RawText] | None = None
    scratch: Any = None

    def __repr__(self) -> str:
        kept = "" if self.strongest_proponents is None else f", k={self.strongest_proponents.values.shape[1]}"
        return f"InfluenceResult(n_test={len(self.test_indices)}, n_train={self.n_train}{kept}, method={self.method})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        n_test = len(self.test_indices)
        n_checkpoints = len(self.checkpoint_ids)
        yield (
            f"{self.method}, {n_test} test and {self.n_train} training examples, "
            f"{n_checkpoints} checkpoint{'s' * (n_checkpoints != 1)}"
        )
        yield from (Text(note, style="italic") for note in self.notes)
        shown = min(_PRINTED_TESTS, n_test)
        for explanation in self.explanations(range(shown), _PRINTED_K):
            yield explained(explanation)
        left = n_test - shown
        if left:
            yield f"... and {left} more test example{'s' * (left > 1)}: result.show(index), index up to {n_test - 1}"

    @property
    def notes(self) -> list[str]:
        """What is missing here, why, and what would bring it."""
        notes = []
        if not self._has_trace:
            notes.append(
                "The trace of these scores is not at hand, or another fit took its place: training examples are shown "
                "by their index alone. Load the result where its trace is for their texts, labels and words."
            )
        if not self._has_words:
            notes.append(f'{described(self.method)} does not tell words; method="tracin-we" does.')
        if self.words_of_ids and all(word == str(token) for token, word in self.words_of_ids.items()):
            notes.append(
                "Token ids are shown for words: there is no tokenizer on the module or its datamodule. Name it "
                "self.tokenizer, or override influence_words."
            )
        return notes

    def show(self, test_index: int, k: int = 5, *, console: Console | None = None) -> None:
        """Print one test example with its k strongest proponents and opponents.

        Args:
            test_index: row of the scores.
            k: how many of each.
            console: where to print; the terminal by default.

        Raises:
            IndexError: if there is no such test example.
        """
        console = console or Console()
        for explanation in self.explanations([test_index], k):
            console.print(explained(explanation))

    def with_texts(
        self,
        train: Sequence[RawText] | None = None,
        test: Sequence[RawText] | None = None,
        *,
        tokenizer: Any = None,
    ) -> InfluenceResult:
        """The same result, shown in the raw texts' own case, spelling and spaces.

        Without them, examples are put together again from their tokens. Raw texts are not saved with the result.

        Args:
            train: the text of each training example, or a pair of texts, by index in the training data set.
            test: the same of the test data set.
            tokenizer: the fast tokenizer that made the token ids; by default the one that was found on the module or
                its datamodule when influence was computed.

        Raises:
            ValueError: if there is no tokenizer that tells offsets, or not a text for each example.
        """
        tokenizer = tokenizer or self.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "with_texts needs the fast tokenizer that made the token ids, to find the tokens in the texts, but got "
                f"{type(tokenizer).__name__}. Pass tokenizer=..."
            )
        needed = {"train": self.n_train, "test": int(self.test_indices.max()) + 1}
        for name, texts in (("train", train), ("test", test)):
            if texts is not None and len(texts) < needed[name]:
                raise ValueError(f"{name} must have a text for each of {needed[name]} examples, but has {len(texts)}.")
        return replace(self, tokenizer=tokenizer, raw_train=train, raw_test=test)

    def explanations(self, test_indices: Sequence[int] | None = None, k: int = 5) -> Iterator[Explanation]:
        """Test examples and their k strongest proponents and opponents, in words.

        Args:
            test_indices: rows of the scores; all by default.
            k: how many of each; fewer where fewer were kept.

        Raises:
            IndexError: if there is no such test example.
        """
        rows = list(range(len(self.test_indices)) if test_indices is None else test_indices)
        for row in rows:
            self._check_test_index(row)
        k = min(k, self._n_kept())
        sides = (self.proponents(k), self.opponents(k))
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            pairs = {row: torch.cat([top.indices[row] for top in sides]).tolist() for row in chunk}
            examples = self._train_examples(sorted({index for of_row in pairs.values() for index in of_row}))
            terms = self._terms(pairs) if self._has_words and self._has_trace else {}
            for row in chunk:
                yield self._explanation(row, sides, examples, terms.get(row, {}))

    def proponents(self, k: int) -> TopK:
        """The k training examples of largest score for each test example.

        Args:
            k: how many; clipped, with a warning, to the number of training examples.

        Returns:
            Values and indices in the training data set, each (n_test, k), largest first.

        Raises:
            ValueError: if fewer than k were kept.
        """
        return self._strongest(k, self.strongest_proponents, largest=True)

    def opponents(self, k: int) -> TopK:
        """The k training examples of smallest (most negative) score for each test example.

        Args:
            k: how many; clipped, with a warning, to the number of training examples.

        Returns:
            Values and indices in the training data set, each (n_test, k), smallest first.

        Raises:
            ValueError: if fewer than k were kept.
        """
        return self._strongest(k, self.strongest_opponents, largest=False)

    def words(self, test_index: int, train_index: int) -> list[tuple[str, float]]:
        """The term of each shared word in a pair's score (Yeh et al. 2022, section 4).

        The pieces of a word are put together. A token that the training example holds more than once, or in several
        of its words, has one term, which is divided equally among its occurrences. Words that print alike are one
        entry; all add up to the pair's score.

        Args:
            test_index: row of the scores.
            train_index: index in the training data set.

        Returns:
            (word, term), strongest magnitude first.

        Raises:
            ValueError: if the method is not TracIn-WE.
            FileNotFoundError: if the trace that the scores were computed from is gone.
        """
        self._check_test_index(test_index)
        train_index = int(train_index)
        if not 0 <= train_index < self.n_train:
            raise IndexError(f"There are training examples 0 to {self.n_train - 1}, but got {train_index}.")
        self._require_words()
        (named,) = self._named_terms(test_index, [train_index])
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
            their labels where that is not known. Scores are about the loss: where the model is mistaken, a positive
            influence speaks for the example's own label.

        Raises:
            ValueError: if the method is not TracIn-WE, or n is under 1.
            FileNotFoundError: if the trace that the scores were computed from is gone.
        """
        self._require_words()
        if n is not None and n < 1:
            raise ValueError(f"n must be None or at least 1, but got {n}.")
        terms = self._word_terms()
        assert self.trace is not None
        said, confidence = self.predictions.T
        classes = groups_of(torch.where(torch.isnan(confidence), self.test_texts.labels, said), self._reader.label)
        return word_table_of(
            self.trace,
            terms,
            self.test_gradients,
            classes,
            self.words_of_ids,
            self._reader.label,
            n=n,
            min_examples=min_examples,
        )

    def plot(
        self,
        kind: Kind = "scores",
        test_index: int | None = None,
        train_index: int | None = None,
        *,
        k: int = 10,
        ax: Axes | None = None,
    ) -> tuple[Figure, Axes]:
        """Draw a chart with matplotlib.

        Args:
            kind: "scores", how they are distributed; "words", what words add to the score of a pair, of a test
                example's k strongest proponents, or of all pairs; "labels", those of the k strongest proponents and
                opponents; or "self_influence" of the training examples, the k highest marked.
            test_index: row of the scores; all by default.
            train_index: index in the training data set, for the words of a pair.
            k: how many; fewer where fewer were kept.
            ax: where to draw; a new figure by default.

        Returns:
            The figure and its axes, as in torchmetrics.

        Raises:
            ModuleNotFoundError: without matplotlib: ``pip install lightning-tracin[plot]``.
            ValueError: if the arguments do not go together, or the method has no words.
            FileNotFoundError: if the trace that the scores were computed from is gone; scores can still be drawn.
        """
        check_plot(kind, test_index, train_index, k)
        if test_index is not None:
            self._check_test_index(test_index)
        if kind == "self_influence":
            return plot_self_influence(self.self_influence(), k, ax)
        whose = "all test examples" if test_index is None else f"test example {int(self.test_indices[test_index])}"
        if kind == "scores":
            which = "" if self.scores is not None else f"the {self._n_kept()} most positive and most negative of "
            title = f"Scores of {which}{self.n_train} training examples for {whose}"
            return plot_scores(self._scores_of(test_index), title, ax)
        k = min(k, self._n_kept())
        if kind == "labels":
            whose = f"each of {len(self.test_indices)} test examples" if test_index is None else whose
            return plot_labels(*self._labels_of(test_index, k), f"Labels of the {k} strongest for {whose}", ax)
        words, of = self._words_of(test_index, train_index, k)
        return plot_words(words, f"Words of {of} for {whose}", ax)

    def self_influence(self) -> Tensor:
        """Every training example's influence on itself: high for mislabelled and for atypical examples.

        Returns:
            (n_train,) float32, by the method and the checkpoints of this result.

        Raises:
            FileNotFoundError: if the trace that the scores were computed from is gone.
        """
        return self_influences(self._checkpoints(), self.method)

    def aggregate(self, how: Literal["mean", "rank", "vote"] = "mean", k: int | None = None) -> Tensor:
        """One value for each training example over all test examples; high for those that help most.

        Args:
            how: "mean" of the scores; mean "rank" (0 for a test example's strongest opponent, n_train - 1 for its
                strongest proponent); or "vote", -Σ max(k - rank, 0): only a test example's k strongest opponents get
                negative votes (arXiv 2511.04715).
            k: for "vote" only, 10 by default.

        Returns:
            (n_train,) float32.

        Raises:
            ValueError: if it needs all scores and only the k strongest were kept.
        """
        if how not in ("mean", "rank", "vote"):
            raise ValueError(f"how must be 'mean', 'rank' or 'vote', but got {how!r}.")
        if how != "vote":
            if k is not None:
                raise ValueError(f'k goes with aggregate("vote"), not with {how!r}.')
            if self.scores is None:
                raise ValueError(f"aggregate({how!r}) needs all scores: call influence without k.")
            if how == "mean":
                return self.scores.mean(0)
            return self.scores.argsort(stable=True, dim=1).argsort(1).float().mean(0)
        opponents = self.opponents(min(10, self.n_train) if k is None else k)
        n_votes = opponents.indices.shape[1]
        votes = torch.arange(n_votes, 0, -1).float().expand(opponents.indices.shape)
        return -torch.zeros(self.n_train, dtype=torch.float32).index_add_(
            0, opponents.indices.flatten(), votes.flatten()
        )

    def to_pandas(self, k: int = 10) -> pd.DataFrame:
        """The k strongest proponents and opponents of each test example, a row each.

        Returns:
            Columns ``test_index`` (row of the scores), ``role`` ("proponent" or "opponent"), ``rank`` (from 1),
            ``train_index``, ``score``, its ``share`` of all scores of its sign that the test example has, and
            ``label`` and ``text`` of the training example as far as they are known.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        return data_frame(self.rows(k))

    def rows(self, k: int = 10) -> list[dict[str, Any]]:
        """The k strongest proponents and opponents of each test example: the rows of :meth:`to_pandas`."""
        k = min(k, self._n_kept())
        tops = {"proponent": self.proponents(k), "opponent": self.opponents(k)}
        wanted = sorted({index for top in tops.values() for index in top.indices.flatten().tolist()})
        examples = self._train_examples(wanted)
        return [
            {
                "test_index": row,
                "role": role,
                "rank": rank + 1,
                "train_index": index,
                "score": score,
                "share": self._share(row, score),
                "label": examples[index].label,
                "text": examples[index].text,
            }
            for role, top in tops.items()
            for row, (values, indices) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True))
            for rank, (score, index) in enumerate(zip(values, indices, strict=True))
        ]

    def to_html(self, path: str | Path, k: int = 20, *, suspects: int = 50, title: str | None = None) -> Path:
        """Write one self-contained HTML page for reading: no server, nothing from a network.

        It shows every test example with its k strongest proponents and opponents, their words shaded by what they add
        to the score; which test examples a training example has pushed; training examples of high self-influence, whose
        labels may be wrong; and the word table. Raw texts (:meth:`with_texts`) read better than tokens.

        Args:
            path: the file, usually ``*.html``.
            k: how many proponents and opponents; fewer where fewer were kept.
            suspects: how many training examples of high self-influence.
            title: the page's heading.

        Returns:
            The path.

        Raises:
            ValueError: if ``k`` is under 1 or ``suspects`` under 0.
            OSError: if the file cannot be written.
        """
        if suspects < 0:
            raise ValueError(f"suspects must be at least 0, but got {suspects}.")
        n_test, n_kept = len(self.test_indices), self._n_kept()
        # The cosine of an example with itself is always 1.
        measure = without_normalizing(self.method) if is_constant_on_itself(self.method) else self.method
        page = Page(
            title=f"What {n_test:,} predictions were learned from" if title is None else title,
            facts=[described(self.method), *counts_of(n_test, self.n_train, len(self.checkpoint_ids))],
            notes=[
                *self.notes,
                *notes_of(
                    has_test_texts=self.raw_test is not None or len(self.test_texts.ids) > 0,
                    has_raw_texts=self.raw_train is not None and self.raw_test is not None,
                    has_predictions=bool(self.predictions[:, 0].isfinite().any()),
                    n_kept=n_kept if n_kept < min(k, self.n_train) else None,
                ),
            ],
            n_train=self.n_train,
            explanations=self.explanations(k=k),
            suspects=self._suspects(suspects, measure) if self._has_trace else None,
            suspects_by=described(measure),
            word_table=self.word_table(_PAGE_WORDS) if self._has_trace and self._has_words else None,
        )
        return write_page(page, path)

    def _n_kept(self) -> int:
        return self.n_train if self.strongest_proponents is None else self.strongest_proponents.values.shape[1]

    def _strongest(self, k: int, kept: TopK | None, *, largest: bool) -> TopK:
        k = clipped_k(k, self.n_train)
        if self.scores is not None:
            return strongest(self.scores, k, largest=largest)
        assert kept is not None
        if k > kept.values.shape[1]:
            raise ValueError(f"Only the {kept.values.shape[1]} strongest were kept: call influence with k={k} or more.")
        return TopK(kept.values[:, :k], kept.indices[:, :k])

    def _check_test_index(self, test_index: int) -> None:
        if not 0 <= test_index < len(self.test_indices):
            raise IndexError(f"There are test examples 0 to {len(self.test_indices) - 1}, but got {test_index}.")

    def _terms(self, pairs: Mapping[int, Sequence[int]]) -> dict[int, dict[int, dict[int, float]]]:
        """The terms of pairs' scores.

        Args:
            pairs: for each test example, training examples.

        Returns:
            For each test example and training example, the term of each shared token id.
        """
        wanted = sorted({index for of_row in pairs.values() for index in of_row})
        places = {index: place for place, index in enumerate(wanted)}
        terms: dict[int, dict[int, dict[int, float]]] = {
            row: {index: defaultdict(float) for index in of_row} for row, of_row in pairs.items()
        }
        for number, term in enumerate(self._word_terms()):
            train = term.prepared_training(term.shards.read_examples(wanted))
            for row, of_row in pairs.items():
                is_paired = torch.zeros(len(wanted), dtype=torch.bool)
                is_paired[[places[index] for index in of_row]] = True
                gradients = self._test_gradients_of(row, number)
                found = term.method.terms(gradients, train.select(is_paired[train.examples]))  # type: ignore[attr-defined]
                for place, token, value in zip(*(column.tolist() for column in found), strict=True):
                    terms[row][wanted[place]][token] += term.weight * value
        return terms

    def _named_terms(self, row: int, train_indices: Sequence[int]) -> list[dict[str, float]]:
        """What each word adds to the score of a test example with each of some training examples, read at once."""
        terms, examples = self._terms({row: train_indices})[row], self._train_examples(train_indices)
        found: list[dict[str, float]] = []
        for index in train_indices:
            example, of_tokens = examples[index], terms[index]
            named: dict[str, float] = defaultdict(float)
            shares = shares_of_words(example.words, example.ids, of_tokens)
            for word, share in zip(example.words, shares, strict=True):
                if any(example.ids[place] in of_tokens for place in word.places):
                    named[word.text] += share
            for token, term in of_tokens.items():
                if token not in example.ids:  # a collate function that draws at random gave another text before
                    named[self.words_of_ids.get(token, str(token))] += term
            found.append(named)
        return found

    def _checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that the scores were computed from, if they are still there."""
        stored = {} if self.trace is None else {each.id: each for each in self.trace.checkpoints}
        if not stored.keys() >= set(self.checkpoint_ids):
            raise FileNotFoundError(
                "The trace that these scores were computed from is gone, or another fit took its place; the words of "
                "a pair and the texts of training examples are read from it."
            )
        return [stored[each] for each in self.checkpoint_ids]

    @property
    def _has_trace(self) -> bool:
        return self.trace is not None and set(self.checkpoint_ids) <= {each.id for each in self.trace.checkpoints}

    def _suspects(self, n: int, method: Method) -> list[Influential]:
        """The training examples of highest self-influence, highest first, with their shares of all of it."""
        values = self_influences(self._checkpoints(), method)
        total = float(values.sum())
        order = values.argsort(descending=True, stable=True)[:n].tolist()
        examples = self._train_examples(sorted(order))
        return [
            Influential(examples[index], float(values[index]), float(values[index]) / total if total else None)
            for index in order
        ]

    def _scores_of(self, row: int | None) -> Tensor:
        """The scores of one test example, or of all; where only the strongest were kept, those, each once."""
        rows = slice(None) if row is None else slice(row, row + 1)
        if self.scores is not None:
            return self.scores[rows].flatten()
        sides = (self.proponents(self._n_kept()), self.opponents(self._n_kept()))
        indices, values = (torch.cat([side[number][rows] for side in sides], 1) for number in (1, 0))
        order = indices.argsort(dim=1, stable=True)
        indices, values = indices.gather(1, order), values.gather(1, order)
        return values[torch.cat([torch.ones_like(indices[:, :1], dtype=torch.bool), indices.diff(dim=1) > 0], 1)]

    def _words_of(self, row: int | None, train_index: int | None, k: int) -> tuple[list[tuple[str, float]], str]:
        """Words and their terms, and whose they are: of a training example, of proponents, or of all examples."""
        if row is None:
            table = self.word_table(n=None)
            return list(zip(table.words, table.values.sum((1, 2)).tolist(), strict=True)), "all training examples"
        if train_index is not None:
            return self.words(row, train_index), f"training example {train_index}"
        self._require_words()
        named: dict[str, float] = defaultdict(float)
        for of_pair in self._named_terms(row, self.proponents(k).indices[row].tolist()):
            for word, term in of_pair.items():
                named[word] += term
        return list(named.items()), f"the {k} strongest proponents"

    def _labels_of(self, row: int | None, k: int) -> tuple[list[str], list[str]]:
        """The labels of the k strongest proponents and opponents of one test example, or of each."""
        rows = slice(None) if row is None else slice(row, row + 1)
        sides = [top.indices[rows].flatten().tolist() for top in (self.proponents(k), self.opponents(k))]
        examples = self._train_examples(sorted({index for side in sides for index in side}))
        labels = [[examples[index].label or "(not known)" for index in side] for side in sides]
        return labels[0], labels[1]

    @property
    def _has_words(self) -> bool:
        """Whether the method has word terms."""
        return word_part(self.method) is not None

    def _require_words(self) -> None:
        """Check that the method has word terms."""
        if not self._has_words:
            raise ValueError(
                f"{self.method} has no word terms: they are a property of the word embedding layer (TracInWE)."
            )

    def _word_terms(self) -> list[Term]:
        """The term of the word embedding table at each checkpoint."""
        terms = (term for checkpoint in self._checkpoints() for term in terms_at(checkpoint, self.method))
        return [term for term in terms if term.site.has_words]

    def _test_gradients_of(self, row: int, checkpoint: int) -> WordGradients:
        """The prepared rows of one test example at a checkpoint, counted from 0."""
        for of_block in self.test_gradients:
            gradients = of_block[checkpoint]
            if row < gradients.n_examples:
                return gradients.slice(row, row + 1)
            row -= gradients.n_examples
        raise IndexError(row)

    def _share(self, row: int, score: float) -> float | None:
        """A score as a part of all scores of its sign that a test example has."""
        if self.totals is None:
            return None
        total = float(self.totals[row, 0 if score >= 0 else 1])
        return score / total if total else None

    def _explanation(
        self,
        row: int,
        sides: Sequence[TopK],
        examples: Mapping[int, Example],
        terms: Mapping[int, Mapping[int, float]],
    ) -> Explanation:
        """One test example and who pushed it, whose texts and terms are known."""
        listed = []
        summed: dict[int, float] = defaultdict(float)
        for number, top in enumerate(sides):
            of_side = []
            for score, index in zip(top.values[row].tolist(), top.indices[row].tolist(), strict=True):
                example = examples[index]
                shares = shares_of_words(example.words, example.ids, terms[index]) if terms else ()
                of_side.append(Influential(example, score, self._share(row, score), tuple(shares)))
                if number == 0:
                    for token, term in terms.get(index, {}).items():
                        summed[token] += term
            listed.append(tuple(of_side))
        test = self._test_example(row)
        own = tuple(shares_of_words(test.words, test.ids, summed)) if terms else ()
        return Explanation(row, test, own, *listed)

    def _test_example(self, row: int) -> Example:
        """What a test example says."""
        prediction, confidence = (None if math.isnan(each) else each for each in self.predictions[row].tolist())
        ids, label = self.test_texts.ids_of(row), self.test_texts.label_of(row)
        index = int(self.test_indices[row])
        return self._reader.example(index, ids, label, self.raw_test, prediction=prediction, confidence=confidence)

    def _train_examples(self, indices: Sequence[int]) -> dict[int, Example]:
        """What training examples say; nothing where the trace is gone."""
        if self.trace is None or not self._has_trace or not indices:
            return {index: Example(index, (), None) for index in indices}
        texts = self.trace.texts(indices)
        labels = [texts.label_of(place) for place in range(len(indices))]
        return {
            index: self._reader.example(index, ids, label, self.raw_train)
            for index, ids, label in zip(indices, texts.ids_by_example(), labels, strict=True)
        }

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.words_of_ids, self.label_names, self.tokenizer)
