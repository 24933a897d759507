"""InfluenceResult: what a query found, with all the ways to print, draw and tabulate it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lightning_tracin.checked_numbers import whole_number
from lightning_tracin.gradients.printable import printable
from lightning_tracin.report.explanation import Explanation
from lightning_tracin.report.page import Page, write_page
from lightning_tracin.report.pairs import Row, dataset_of_pairs, rows_of_pairs, table_of_pairs
from lightning_tracin.report.plots import Kind, plot_labels, plot_scores, plot_self_influence, plot_words, pyplot
from lightning_tracin.report.rich_repr import RichRepr
from lightning_tracin.report.tables import explained
from lightning_tracin.results.evidence import Evidence
from lightning_tracin.results.excerpt import LISTED_SUSPECTS, LISTED_WORDS
from lightning_tracin.results.notes import notes_of_page, notes_of_result, notes_of_trace, notes_of_words
from lightning_tracin.results.portable_result import PortableResult
from lightning_tracin.results.rows import checked_row
from lightning_tracin.scoring.naming import described

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(repr=False, eq=False)
class InfluenceResult(RichRepr, PortableResult):
    """How much each training example pushed what is explained of each test example: its label, or another target.

    A positive score belongs to a proponent (training on it made the target likelier, as it lowered the loss), a
    negative one to an opponent. Training examples are numbered by their index in the training data set.
    ``print(result)`` shows a table.

    Attributes:
        scores: (n_test, n_train) float32, or None if only the k strongest were kept.
        tokenizer: what turns token ids into words again; without one, pieces are shown as they are.
        raw_test: the texts of the test examples as they were before the tokenizer (:meth:`with_texts`).
        raw_train: those of the training examples.

    The others are those of :class:`~lightning_tracin.results.stored_result.StoredResult`.
    """

    def __repr__(self) -> str:
        kept = "" if self.strongest_proponents is None else f", k={self.strongest_proponents.values.shape[1]}"
        target = "" if self.target == "label" else f", target={self.target!r}"
        n_test = len(self.test_indices)
        return f"InfluenceResult(n_test={n_test}, n_train={self.n_train}{kept}, method={self.method}{target})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        n_test = len(self.test_indices)
        scored = "candidates, not trained on" if self.candidates else "training examples"
        yield Text(f"{printable(str(self.method))}, {n_test} test and {self._n_drawn} {scored}, {self._checkpoints}")
        if self.target != "label":
            yield Text(f"target {printable(self.target)}: training on proponents made it likelier")
        evidence = Evidence.find(self)
        first = self._first_explanations(evidence)
        yield from (Text(printable(note), style="italic") for note in self._notes_given(evidence, first))
        yield from map(explained, first)
        left = n_test - len(first)
        if left:
            yield f"... and {left} more test example{'s' * (left > 1)}: result.show(row), row up to {n_test - 1}"

    @property
    def notes(self) -> list[str]:
        """What is missing here or hides the rest, why, and what would bring it."""
        evidence = Evidence.find(self)
        return self._notes_given(evidence, self._first_explanations(evidence))

    def show(self, test_index: int, k: int = 5, *, console: Console | None = None) -> None:
        """Print one test example with its k strongest proponents and opponents.

        Args:
            test_index: row of the scores, which is the index in the test data set where all of that was asked about.
            k: how many of each.
            console: where to print; the terminal by default.

        Raises:
            IndexError: if there is no such row.
            ValueError: if ``k`` is no whole number of at least 1.
        """
        console = console or Console()
        for explanation in self.explanations([test_index], k):
            console.print(explained(explanation))

    def rows(self, k: int = 10) -> list[Row]:
        """The k strongest proponents and opponents of each test example: the rows of :meth:`to_pandas`.

        The columns, the same in every table of results, are those of
        :func:`~lightning_tracin.report.pairs.rows_of_pairs`.
        """
        return [row for explanation in self.explanations(k=k) for row in rows_of_pairs(explanation)]

    def to_pandas(self, k: int = 10) -> pd.DataFrame:
        """The k strongest proponents and opponents of each test example, a row each.

        Proponents have positive scores, opponents negative ones. Training examples with the same token ids and label
        are one row, that of the strongest of them.

        Returns:
            Columns ``test_loader`` (its name, where there were several), ``test_row`` (row of the scores),
            ``test_index`` (index in the test data set, as ``test_indices`` has it), ``test_text``, ``test_label``,
            ``prediction``, ``confidence``, ``target`` (what is explained), ``role`` ("proponent" or "opponent"),
            ``rank`` (from 1), ``train_index``, ``score``, its ``share`` of all scores of its sign that the test example
            has, ``train_text``, ``train_label``, and ``words``, a list of the strongest, each with ``word`` and
            ``term``; as far as they are known.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        return table_of_pairs(self.rows(k))

    def to_dataset(self, k: int = 10) -> datasets.Dataset:
        """The rows of :meth:`to_pandas` as a data set of Hugging Face, which lies in Arrow.

        From there it goes to the Hub (``push_to_hub``), to DuckDB, Argilla, Spotlight, or a file of Parquet.

        Returns:
            The same columns; ``words`` are lists of structs.

        Raises:
            ModuleNotFoundError: without datasets: ``pip install lightning-tracin[datasets]``.
        """
        return dataset_of_pairs(self.rows(k))

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
        k = whole_number("k", k)
        _check_plot(kind, test_index, train_index)
        row = None if test_index is None else checked_row(test_index, self.test_indices)
        if kind == "self_influence":
            return plot_self_influence(self.self_influence(), k, ax)
        whose = "all test examples" if row is None else self._test_name(row)
        if self.target != "label":
            whose += f" (target {self.target if row is None else self.target_names[row]})"
        if kind == "scores":
            which = "" if self.scores is not None else f"the {self._n_kept} most positive and most negative of "
            title = f"Scores of {which}{self._n_drawn} training examples for {whose}"
            return plot_scores(self._known_scores(row), title, ax)
        k = min(k, self._n_kept)
        if kind == "labels":
            whose = f"each of {len(self.test_indices)} test examples" if row is None else whose
            return plot_labels(*self._labels_of(row, k), f"Labels of the {k} strongest for {whose}", ax)
        words, of_whom = self._words_of(row, train_index, k)
        return plot_words(words, f"Words of {of_whom} for {whose}", ax)

    def to_html(
        self, path: str | Path, k: int = 20, *, suspects: int = LISTED_SUSPECTS, title: str | None = None
    ) -> Path:
        """Write one self-contained HTML page for reading: no server, nothing from a network.

        It shows every test example with its k strongest proponents and opponents, their words shaded by what they add
        to the score; which test examples a training example has pushed; training examples whose labels may be wrong
        (:meth:`label_issues`); and the word table. Raw texts (:meth:`with_texts`) read better than tokens.

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
        k, suspects = whole_number("k", k), whole_number("suspects", suspects, at_least=0)
        evidence = Evidence.find(self)
        n_test, n_kept = len(self.test_indices), self._n_kept
        is_known = evidence is not None or self.excerpt is not None
        has_word_table = evidence is not None or (self.excerpt is not None and self.excerpt.word_table is not None)
        counts = [
            _counted(n_test, "test example"),
            f"{self._n_drawn:,} candidates, not trained on"
            if self.candidates
            else _counted(self._n_drawn, "training example"),
            self._checkpoints,
        ]
        page = Page(
            title=f"What {n_test:,} predictions were learned from" if title is None else title,
            facts=[described(self.method), *counts, *([] if self.target == "label" else [f"target {self.target}"])],
            notes=[
                *self._notes_given(evidence, self._first_explanations(evidence)),
                *notes_of_page(
                    has_test_texts=self.raw_test is not None or len(self.test_texts.ids) > 0,
                    has_raw_texts=self.raw_train is not None and self.raw_test is not None,
                    has_predictions=bool(self.predictions[:, 0].isfinite().any()),
                    n_kept=n_kept if n_kept < min(k, self._n_drawn) else None,
                ),
            ],
            n_train=self.n_train,
            explanations=self._explanations_from(evidence, range(n_test), k),
            suspects=self.label_issues(n=suspects) if is_known else None,
            word_table=self.word_table(LISTED_WORDS) if self._has_words and has_word_table else None,
            target=self.target,
        )
        return write_page(page, path)

    @property
    def _checkpoints(self) -> str:
        """How many checkpoints the scores are sums over, and of which steps; predictions are those of the last."""
        steps = list(dict.fromkeys([*self.checkpoint_steps[:1], *self.checkpoint_steps[-1:]]))
        of_steps = f" (step{'s' * (len(steps) > 1)} {' to '.join(map(str, steps))})" if steps else ""
        return _counted(len(self.checkpoint_ids), "checkpoint") + of_steps

    def _notes_given(self, evidence: Evidence | None, first: Sequence[Explanation]) -> list[str]:
        """All notes; what the first explanations show stands for all of them."""
        held = self.excerpt
        notes = notes_of_result(
            self.method,
            self.words_of_ids,
            has_evidence=evidence is not None,
            k_held=None if held is None else held.k,
        )
        if evidence is not None:
            return [*notes, *notes_of_trace(evidence), *notes_of_words(evidence, first, self.words_of_ids)]
        return notes if held is None else [*notes, *held.notes]

    def _words_of(self, row: int | None, train_index: int | None, k: int) -> tuple[list[tuple[str, float]], str]:
        """Words and their terms, and whose they are: of a training example, of proponents, or of all examples."""
        if row is None:
            table = self.word_table(n=None)
            return list(zip(table.words, table.values.sum((1, 2)).tolist(), strict=True)), "all training examples"
        if train_index is not None:
            return self.words(row, train_index), f"training example {train_index}"
        self._require_words()
        named: dict[str, float] = defaultdict(float)
        proponents, _ = self._listed(Evidence.find(self), [row], k)[row]
        for of_pair in self._named_terms(row, [entry.index for entry in proponents]):
            for word, term in of_pair.items():
                named[word] += term
        return list(named.items()), f"the {k} strongest proponents"

    def _test_name(self, row: int) -> str:
        """A test example by its index, and by its loader where there are several."""
        loader = self._loader_of(row)
        return f"test example {int(self.test_indices[row])}" + ("" if loader is None else f" of {loader}")

    def _labels_of(self, row: int | None, k: int) -> tuple[list[str], list[str]]:
        """The labels of the k strongest proponents and opponents of one test example, or of each."""
        evidence = Evidence.find(self)
        of_rows = self._listed(evidence, range(len(self.test_indices)) if row is None else [row], k).values()
        sides = [[entry.index for both in of_rows for entry in both[number]] for number in (0, 1)]
        examples = self._examples_in(evidence, sorted({index for side in sides for index in side}))
        labels = [[examples[index].label or "(not known)" for index in side] for side in sides]
        return labels[0], labels[1]


def _check_plot(kind: str, test_index: int | None, train_index: int | None) -> None:
    """Check the arguments of a plot, and that matplotlib is installed, before anything is computed.

    Raises:
        ValueError: if the arguments do not go together.
        ModuleNotFoundError: without matplotlib.
    """
    if kind not in ("scores", "words", "labels", "self_influence"):
        raise ValueError(f"kind must be 'scores', 'words', 'labels' or 'self_influence', but got {kind!r}.")
    if train_index is not None and (kind != "words" or test_index is None):
        raise ValueError(f"train_index goes with kind='words' and a test_index, but got kind={kind!r}, {test_index=}.")
    if test_index is not None and kind == "self_influence":
        raise ValueError("kind='self_influence' is about training examples alone: leave out test_index.")
    pyplot()


def _counted(n: int, name: str) -> str:
    """A number of things in words, such as "1 checkpoint" or "2,000 training examples"."""
    return f"{n:,} {name}{'' if n == 1 else 's'}"
