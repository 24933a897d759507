"""The word table: each word's influence on every class of a whole test set, to print or to take numbers from."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_tracin.checked_numbers import real_number
from lightning_tracin.gradients.printable import printable
from lightning_tracin.report.palette import TERMINAL_AGAINST, TERMINAL_FOR
from lightning_tracin.report.rich_repr import RichRepr, data_frame

if TYPE_CHECKING:
    import pandas as pd

_PRINTED_WORDS = 20

_WORD_WIDTH, _COUNT_WIDTH, _CLASS_WIDTH = 12, 5, 11


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
class WordTable(RichRepr):
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
        target: what of the test examples a positive influence speaks for.
        common: whether many training examples hold each token of each word. It is grey, but keeps its place: a word of
            so many examples may be a shortcut.
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
    target: str = "label"
    common: tuple[bool, ...] = ()

    def __repr__(self) -> str:
        return f"WordTable(n_words={len(self.words)}, classes={self.classes}, labels={self.labels})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        net = self.values[:_PRINTED_WORDS].sum(2)
        unit = _unit(net)
        of = "" if self.target == "label" else f", target {printable(self.target)}"
        yield Text(
            f"Words by their influence on {int(self.class_sizes.sum())} test examples{of}, in units of {unit:.0e}"
        )
        yield _printed(self, net / unit, options.max_width)
        if len(self.words) > _PRINTED_WORDS:
            yield f"{_PRINTED_WORDS} of {len(self.words)} words; to_pandas() has all"
        if self.n_left:
            yield f"{self.n_left} words of less influence or in too few examples are left out"

    def is_stop(self, word: int) -> bool:
        """Whether the word of that number is a special token or a common one."""
        return self.special[word] or bool(self.common and self.common[word])

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
            ValueError: if there is only one label, or ``purity`` is not from 0 to 1.
        """
        purity = real_number("purity", purity, at_least=0, at_most=1)
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
        printed.add_column(
            Text(printable(table.classes[each])), max_width=max(_CLASS_WIDTH, room // n_shown - 1), no_wrap=True
        )
    for place, numbers in enumerate(net.tolist()):
        word = Text(printable(table.words[place]), style="dim italic" if table.is_stop(place) else "")
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
    label = f" {printable(table.labels[int(values.abs().argmax())])}" if len(table.labels) > 1 else ""
    styles = TERMINAL_FOR if net >= 0 else TERMINAL_AGAINST
    return Text.assemble((f"{net:+.1f}", styles.number), label)
