"""Which words carry a whole test set: each word's influence on every class, summed over all pairs of examples.

A word's term is a product of two gradient rows, so over the test examples of a class it is the product of a training
row with the *sum* of their rows. A class is multiplied like one test example that holds the rows of all of its members,
and nothing has to be known of single pairs: one pass over the stored gradients is enough, and it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.words import marks_of, words_of
from lightning_tracin.scoring.terms import Term
from lightning_tracin.storage.trace import Trace

_PIECE = 2**24  # products that are in memory at once


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
    terms: Sequence[Term],
    tests: Sequence[Sequence[WordGradients]],
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
        terms: of the word embedding table at each checkpoint.
        tests: the prepared gradients of blocks of test examples, of each block at each checkpoint.
        classes: of the test examples.
        tokens: what to print for token ids.
        name_label: what to print for a training example's label.
        n: how many words to list; None for all.
        min_examples: leave out words that fewer training examples hold.
    """
    stored = [term.shards for term in terms]
    summed = [_summed([of_block[number] for of_block in tests], classes) for number in range(len(terms))]
    shards = [range(*stored[0].bounds(shard)) for shard in range(len(stored[0]))]
    labels = groups_of(torch.cat([trace.texts(examples).labels for examples in shards]), name_label)
    tally = _Tally(tokens, torch.zeros(0, len(classes.names), dtype=torch.float64))
    for shard, examples in enumerate(shards):
        texts = trace.texts(examples)
        of_label = labels.of[examples.start : examples.stop]
        places = tally.enter(texts, of_label)
        for term, test, gradients in zip(terms, summed, stored, strict=True):
            for train in _pieces(term.prepared_training(gradients.read(shard)), len(classes.names)):
                as_examples = replace(train, n_examples=len(train.tokens), examples=torch.arange(len(train.tokens)))
                products = term.weight * term.method.dot(test, as_examples, term.moments).T.double()
                tally.add(texts, places, of_label, train, products)
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


def _summed(blocks: Sequence[WordGradients], classes: Groups) -> WordGradients:
    """Each class as one example, which has the sum of its members' rows; of blocks of test examples in turn."""
    first = torch.tensor([0, *(block.n_examples for block in blocks)]).cumsum(0).tolist()
    sums = [
        WordGradients.from_positions(
            len(classes.names),
            classes.of[block.examples + start],
            block.tokens,
            block.directions.float() * block.factors[:, None],
        )
        for block, start in zip(blocks, first, strict=False)
    ]
    rows = torch.cat([each.directions * each.norms[:, None] for each in sums])
    examples, tokens = (torch.cat([getattr(each, name) for each in sums]) for name in ("examples", "tokens"))
    return sums[0] if len(sums) == 1 else WordGradients.from_positions(len(classes.names), examples, tokens, rows)


def _pieces(train: WordGradients, n_classes: int) -> Iterator[WordGradients]:
    """A block in pieces of so many rows that their products fit into memory, without a copy of the rows."""
    size = max(1, _PIECE // n_classes)
    for start in range(0, len(train.tokens), size):
        yield train.select(slice(start, start + size))
