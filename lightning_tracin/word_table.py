"""Which words carry a whole test set: each word's influence on every class, summed over all pairs of examples.

A word's term is a product of two gradient rows, so over the test examples of a class it is the product of a training
row with the *sum* of their rows. A class is multiplied like one test example that holds the rows of all of its members,
and nothing has to be known of single pairs: one pass over the stored gradients is enough, and it is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_tracin.gradients import Texts, WordGradients
from lightning_tracin.methods import TracInWE
from lightning_tracin.report.shown import Shown, data_frame
from lightning_tracin.scores import moments_of
from lightning_tracin.trace import Checkpoint, Trace
from lightning_tracin.words import marks_of, words_of

if TYPE_CHECKING:
    import pandas as pd

_PRINTED_WORDS = 20
_WORD_WIDTH, _COUNT_WIDTH, _CLASS_WIDTH = 12, 5, 11
_FOR, _AGAINST = "dodger_blue2", "dark_orange3"  # as the words of an example are shaded
_PIECE = 2**24  # products that are in memory at once


class Shortcut(NamedTuple):
    """A word whose influence on a class comes nearly all from the training examples of one label.

    Attributes:
        word: the word.
        predicted: the class.
        label: the label.
        influence: of the word in the training examples of that label on the test examples of that class.
        share: of all magnitudes of all words on that class.
        purity: what part of the word's own magnitudes on that class it is.
    """

    word: str
    predicted: str
    label: str
    influence: float
    share: float
    purity: float


@dataclass(frozen=True, repr=False, eq=False)
class WordTable(Shown):
    """What each word of the training examples adds to the scores of a whole test set, strongest word first.

    Strong is a word by the sum of its magnitudes over classes and labels. ``print(table)`` shows the strongest.

    Attributes:
        words: what to print for each; those that print alike are one.
        special: whether each is a token that the tokenizer has added, such as [CLS].
        classes: what the model says of test examples, or their labels where that is not known; "all" without either.
        labels: of training examples; "all" where they have none that is a whole number.
        values: (n_words, n_classes, n_labels) float32, the sum of the word's terms over all pairs of a test example of
            the class and a training example of the label. Over all words it is the sum of those pairs' scores.
        examples: (n_words, n_labels) int64, how many training examples of each label hold the word.
        class_sizes: (n_classes,) int64, number of test examples.
        label_sizes: (n_labels,) int64, number of training examples.
        magnitudes: (n_classes,) float32, the sum of all words' magnitudes on each class, listed here or not.
        n_left: how many words with any influence are not listed.
    """

    words: tuple[str, ...]
    special: tuple[bool, ...]
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    values: Tensor
    examples: Tensor
    class_sizes: Tensor
    label_sizes: Tensor
    magnitudes: Tensor
    n_left: int

    def __repr__(self) -> str:
        return f"WordTable(n_words={len(self.words)}, classes={self.classes}, labels={self.labels})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        net = self.values[:_PRINTED_WORDS].sum(2)
        unit = _unit(net)
        yield Text(f"Words by their influence on {int(self.class_sizes.sum())} test examples, in {unit:.0e}")
        yield _printed(self, net / unit, options.max_width)
        if len(self.words) > _PRINTED_WORDS:
            yield f"{_PRINTED_WORDS} of {len(self.words)} words; to_pandas() has all"
        if self.n_left:
            yield f"{self.n_left} words of less influence or in too few examples are left out"

    def shortcuts(self, purity: float = 0.9) -> list[Shortcut]:
        """Words that may stand for a class by themselves, those that carry the largest share of it first.

        A word that the training examples of all labels hold pushes a class from one side and back from the others; one
        that pushes it from one label alone is a mark of that label. It is a shortcut if the label does not follow from
        it outside of this data: that is for people to judge.

        Args:
            purity: the least part of a word's magnitudes on a class that comes from its strongest label, 0 to 1.

        Returns:
            Of the words that are listed, special tokens left out, those whose strongest label pushes towards the class.

        Raises:
            ValueError: if there is only one label.
        """
        if len(self.labels) < 2:
            raise ValueError(f"shortcuts needs training examples of several labels, but all have {self.labels[0]!r}.")
        best = self.values.max(2)
        purities = best.values / self.values.abs().sum(2)
        found = [
            Shortcut(
                self.words[word],
                self.classes[of_class],
                self.labels[int(best.indices[word, of_class])],
                float(best.values[word, of_class]),
                float(best.values[word, of_class] / self.magnitudes[of_class]),
                float(purities[word, of_class]),
            )
            for word, of_class in torch.nonzero((purities >= purity) & (best.values > 0)).tolist()
            if not self.special[word]
        ]
        return sorted(found, key=lambda each: -each.share)

    def to_pandas(self) -> pd.DataFrame:
        """A row for each word, class and label, strongest word first.

        Returns:
            Columns ``word``, ``special``, ``class`` (of the test examples), ``label`` (of the training examples),
            ``influence``, and ``examples``, the number of training examples of that label that hold the word.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        cells = itertools.product(zip(self.words, self.special, strict=True), self.classes, self.labels)
        values, examples = self.values.flatten().tolist(), self.examples[:, None].expand_as(self.values).flatten()
        rows = [
            (word, special, of_class, label, value, count)
            for ((word, special), of_class, label), value, count in zip(cells, values, examples.tolist(), strict=True)
        ]
        return data_frame(rows, columns=["word", "special", "class", "label", "influence", "examples"])


@dataclass(frozen=True)
class Groups:
    """Examples by a whole number that each has: a class, or a label.

    Attributes:
        names: what to print for each group, by ascending number; "none" is the last one's, of examples without.
        of: (n_examples,) int64, the group of each example.
    """

    names: tuple[str, ...]
    of: Tensor

    @property
    def sizes(self) -> Tensor:
        """(n_groups,) number of examples."""
        return torch.bincount(self.of, minlength=len(self.names))


def groups_of(values: Tensor, name: Callable[[float], str | None]) -> Groups:
    """Examples by their values; one group, "all", if no example has one, or if they are not whole numbers.

    Args:
        values: (n_examples,) float64, NaN where an example has none.
        name: what to print for a value.

    Example:
        >>> groups_of(torch.tensor([4.0, torch.nan, 2.0, 4.0]), str)
        Groups(names=('2.0', '4.0', 'none'), of=tensor([1, 2, 0, 1]))
    """
    is_known = ~torch.isnan(values)
    known = values[is_known]
    if not len(known) or bool((known != known.round()).any()):
        return Groups(("all",), torch.zeros(len(values), dtype=torch.long))
    numbers, of_known = torch.unique(known, return_inverse=True)
    names = [str(name(number)) for number in numbers.tolist()] + ["none"] * (len(known) < len(values))
    of = torch.full((len(values),), len(numbers))
    of[is_known] = of_known
    return Groups(tuple(names), of)


def word_table_of(
    trace: Trace,
    checkpoints: Sequence[Checkpoint],
    method: TracInWE,
    tests: Sequence[WordGradients],
    classes: Groups,
    tokens: Mapping[int, str],
    name_label: Callable[[float], str | None],
    *,
    n: int | None,
    min_examples: int,
) -> WordTable:
    """Sum the terms of all pairs by word, class and label, shard by shard.

    As in the words of a pair, the term of a token in a training example is divided equally among its occurrences there,
    and each occurrence counts for the word that it is a part of. A token that has a gradient at a checkpoint but is not
    in the text that was stored (a mask that falls elsewhere each time) stands for itself.

    Args:
        trace: has the training examples' texts.
        checkpoints: those that have the method's gradients.
        method: what scores are.
        tests: the test examples' prepared gradients at each checkpoint.
        classes: of the test examples.
        tokens: what to print for token ids.
        name_label: what to print for a training example's label.
        n: how many words to list; None for all.
        min_examples: leave out words that fewer training examples hold.
    """
    stored = [checkpoint.gradients(method.name) for checkpoint in checkpoints]
    moments = [moments_of(checkpoint, method) for checkpoint in checkpoints]
    rates = [checkpoint.learning_rate_of(method.name) for checkpoint in checkpoints]
    summed = [_summed(test, classes) for test in tests]
    shards = [range(*stored[0].bounds(shard)) for shard in range(len(stored[0]))]
    labels = groups_of(torch.cat([trace.texts(examples).labels for examples in shards]), name_label)
    tally = _Tally(tokens, torch.zeros(0, len(classes.names), dtype=torch.float64))
    for shard, examples in enumerate(shards):
        texts = trace.texts(examples)
        of_label = labels.of[examples.start : examples.stop]
        places = tally.enter(texts, of_label)
        for test, gradients, moment, rate in zip(summed, stored, moments, rates, strict=True):
            for train in _pieces(method.prepare(gradients.read(shard), moment, "train"), len(classes.names)):
                as_examples = replace(train, n_examples=len(train.tokens), examples=torch.arange(len(train.tokens)))
                terms = rate * method.dot(test, as_examples, moment).T.double()
                tally.add(texts, places, of_label, train, terms)
    return tally.table(classes, labels, n, min_examples)


@dataclass
class _Tally:
    """What has been summed so far, in an entry for each word and label that were come upon.

    Attributes:
        tokens: what to print for token ids.
        sums: (n_entries, n_classes) float64.
        counts: (n_entries,) int64, the training examples that hold the word and have the label.
        numbers: of the entries, by word and label.
        special: the words that the tokenizer has added.
    """

    tokens: Mapping[int, str]
    sums: Tensor
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._marks = marks_of(self.tokens.values())

    def enter(self, texts: Texts, labels: Tensor) -> Tensor:
        """Come upon a block of training examples, with their labels (n_examples,); the entry of each position (P,)."""
        entries: list[int] = []
        for ids, label in zip(texts.ids_by_example(), labels.tolist(), strict=True):
            entries += self._entries(ids, label)
        found = torch.tensor(entries, dtype=torch.long)
        held = torch.unique(torch.stack([texts.examples, found]), dim=1)[1]
        self._grow()
        self.counts += torch.bincount(held, minlength=len(self.counts))
        return found

    def add(self, texts: Texts, entries: Tensor, labels: Tensor, train: WordGradients, terms: Tensor) -> None:
        """Add the terms (R, n_classes) of the rows of a block to the words that their tokens are parts of."""
        occurrences = texts.ids * texts.n_examples + texts.examples
        rows = train.tokens * train.n_examples + train.examples
        row = torch.searchsorted(rows, occurrences).clamp(max=max(len(rows) - 1, 0))
        found = torch.nonzero(rows[row] == occurrences)[:, 0] if len(rows) else row[:0]
        row = row[found]
        times = torch.bincount(row, minlength=len(rows))
        self.sums.index_add_(0, entries[found], terms[row] / times[row, None])
        left = torch.nonzero((times == 0) & (terms != 0).any(1))[:, 0]
        own = [
            self._entries([token], label)[0]
            for token, label in zip(train.tokens[left].tolist(), labels[train.examples[left]].tolist(), strict=True)
        ]
        self._grow()
        self.sums.index_add_(0, torch.tensor(own, dtype=torch.long), terms[left])

    def table(self, classes: Groups, labels: Groups, n: int | None, min_examples: int) -> WordTable:
        """The n strongest words."""
        words = list(dict.fromkeys(word for word, _ in self.numbers))
        places = {word: place for place, word in enumerate(words)}
        word_of = torch.tensor([places[word] for word, _ in self.numbers], dtype=torch.long)
        label_of = torch.tensor([label for _, label in self.numbers], dtype=torch.long)
        strengths = torch.zeros(len(words), dtype=torch.float64).index_add_(0, word_of, self.sums.abs().sum(1))
        held_by = torch.zeros(len(words), dtype=torch.long).index_add_(0, word_of, self.counts)
        order = torch.argsort(strengths, descending=True, stable=True)
        listed = order[(strengths[order] > 0) & (held_by[order] >= min_examples)][:n]
        rank = torch.full((len(words),), -1)
        rank[listed] = torch.arange(len(listed))
        entries = torch.nonzero(rank[word_of] >= 0)[:, 0]
        cells = rank[word_of[entries]], label_of[entries]
        values = torch.zeros(len(listed), len(labels.names), len(classes.names), dtype=torch.float64)
        values[cells] = self.sums[entries]
        examples = torch.zeros(len(listed), len(labels.names), dtype=torch.long)
        examples[cells] = self.counts[entries]
        names = tuple(words[place] for place in listed.tolist())
        return WordTable(
            words=names,
            special=tuple(name in self.special for name in names),
            classes=classes.names,
            labels=labels.names,
            values=values.transpose(1, 2).float(),
            examples=examples,
            class_sizes=classes.sizes,
            label_sizes=labels.sizes,
            magnitudes=self.sums.abs().sum(0).float(),
            n_left=int((strengths > 0).sum()) - len(listed),
        )

    def _entries(self, ids: Sequence[int], label: int) -> list[int]:
        """The entry of each token of an example."""
        entries = [0] * len(ids)
        for word in words_of([self.tokens.get(token, str(token)) for token in ids], self._marks):
            number = self.numbers.setdefault((word.text, label), len(self.numbers))
            for place in word.places:
                entries[place] = number
            if word.special:
                self.special.add(word.text)
        return entries

    def _grow(self) -> None:
        """Make room for the entries that are new."""
        new = len(self.numbers) - len(self.counts)
        if new:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(new, self.sums.shape[1])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(new)])


def _summed(test: WordGradients, classes: Groups) -> WordGradients:
    """Each class as one example, which has the sum of its members' rows."""
    rows = test.directions.float() * test.factors[:, None]
    return WordGradients.from_positions(len(classes.names), classes.of[test.examples], test.tokens, rows)


def _pieces(train: WordGradients, n_classes: int) -> Iterator[WordGradients]:
    """A block in pieces of so many rows that their products fit into memory, without a copy of the rows."""
    size = max(1, _PIECE // n_classes)
    for start in range(0, len(train.tokens), size):
        yield train.select(slice(start, start + size))


def _unit(net: Tensor) -> float:
    """A power of ten that the largest of some numbers has two digits in."""
    largest = float(net.abs().max()) if net.numel() else 0.0
    return 10.0 ** (math.floor(math.log10(largest)) - 1) if largest else 1.0


def _printed(table: WordTable, net: Tensor, width: int) -> Table:
    """The strongest words: each class's net influence, and the label that most of it comes from.

    Args:
        table: the words.
        net: (printed words, n_classes) what to print.
        width: of the terminal. Of classes that do not fit, those of the largest magnitudes are shown.
    """
    room = width - _WORD_WIDTH - _COUNT_WIDTH - 3
    n_shown = max(1, min(len(table.classes), room // (_CLASS_WIDTH + 1)))
    shown = torch.argsort(table.magnitudes, descending=True, stable=True)[:n_shown].sort().values.tolist()
    printed = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    printed.add_column("word", width=_WORD_WIDTH, no_wrap=True)
    printed.add_column("train", justify="right", no_wrap=True, min_width=_COUNT_WIDTH)
    for each in shown:
        printed.add_column(Text(table.classes[each]), max_width=max(_CLASS_WIDTH, room // n_shown - 1), no_wrap=True)
    for place, numbers in enumerate(net.tolist()):
        word = Text(table.words[place], style="dim italic" if table.special[place] else "")
        cells = [_cell(table, place, each, numbers[each]) for each in shown]
        printed.add_row(word, str(int(table.examples[place].sum())), *cells)
    if n_shown < len(table.classes):
        printed.caption = f"{n_shown} of {len(table.classes)} classes; to_pandas() has all"
    return printed


def _cell(table: WordTable, word: int, of_class: int, net: float) -> Text:
    """A net influence, and the label that most of it comes from."""
    values = table.values[word, of_class]
    if not bool(values.any()):
        return Text("")
    label = f" {table.labels[int(values.abs().argmax())]}" if len(table.labels) > 1 else ""
    return Text.assemble((f"{net:+.1f}", _FOR if net >= 0 else _AGAINST), label)
