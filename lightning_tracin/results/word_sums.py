"""Each word's influence on every class of a whole test set, summed over all pairs of examples.

A word's term is a product of two gradient rows, so over the test examples of a class it is the product of a training
row with the *sum* of their rows. A class is multiplied like one test example that holds the rows of all of its members,
and nothing has to be known of single pairs: one pass over the stored gradients is enough, and it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_tracin.gradients import memory
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.evidence import Evidence
from lightning_tracin.results.reader import Reader
from lightning_tracin.scoring.score import require_finite_scores


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
    evidence: Evidence, classes: Groups, reader: Reader, *, n: int | None, min_examples: int
) -> WordTable:
    """Sum the terms of all pairs by word, class and label, shard by shard.

    As in the words of a pair, the term of a token in a training example is divided equally among its occurrences there,
    and each occurrence counts for the word that it is a part of. A token that has a gradient at a checkpoint but is not
    in the text that was stored (a mask that falls elsewhere each time) stands for itself.

    Args:
        evidence: has the gradients of both sides, and the training examples' texts.
        classes: of the test examples.
        reader: what to print for token ids and labels.
        n: how many words to list; None for all.
        min_examples: leave out words that fewer training examples hold.
    """
    terms, trace = evidence.word_terms, evidence.trace
    stored = [term.shards for term in terms]
    tests = [
        _summed([of_block[checkpoint] for of_block in evidence.test_gradients], classes)
        for checkpoint in range(len(terms))
    ]
    shards = [range(*stored[0].bounds(shard)) for shard in range(len(stored[0]))]
    labels = groups_of(torch.cat([trace.texts(examples).labels for examples in shards]), reader.label)
    tally = _Tally(reader, torch.zeros(0, len(classes.names), dtype=torch.float64))
    for shard, examples in enumerate(shards):
        texts = trace.texts(examples)
        label_of = labels.of[examples.start : examples.stop]
        entry_of = tally.enter(texts, label_of)
        for term, test, gradients in zip(terms, tests, stored, strict=True):
            if not gradients.holds(shard):
                continue
            for train in _pieces(term.prepared_training(gradients.read(shard)), len(classes.names)):
                # With each row as an example of its own, a product of examples is the term of a single word.
                rows = replace(train, n_examples=len(train.tokens), examples=torch.arange(len(train.tokens)))
                products = term.dot(test, rows).T.double()
                require_finite_scores(products, "words")
                tally.add(texts, entry_of, label_of, train, products)
    return tally.table(classes, labels, n, min_examples)


@dataclass
class _Tally:
    """Running sums, with one entry for each word and label that occur together.

    Attributes:
        reader: what to print for token ids.
        sums: (n_entries, n_classes) float64.
        counts: (n_entries,) int64, the training examples that hold the word and have the label.
        entries: the number of each word's and label's entry.
        special: the words that the tokenizer has added.
        common: those of tokens that many training examples hold.
    """

    reader: Reader
    sums: Tensor
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    entries: dict[tuple[str, int], int] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    common: set[str] = field(default_factory=set)

    def enter(self, texts: Texts, labels: Tensor) -> Tensor:
        """Count the words of a block of training examples.

        Args:
            texts: the block.
            labels: (n_examples,) the label's number of each example.

        Returns:
            (P,) the entry of each position of the texts.
        """
        entry_of: list[int] = []
        said = zip(texts.ids_by_example(), texts.marks_by_example(), labels.tolist(), strict=True)
        for ids, marks, label in said:
            entry_of += self._entries_of(ids, label, marks)
        found = torch.tensor(entry_of, dtype=torch.long)
        held = torch.unique(torch.stack([texts.examples, found]), dim=1)[1]
        self._grow()
        self.counts += torch.bincount(held, minlength=len(self.counts))
        return found

    def add(self, texts: Texts, entry_of: Tensor, labels: Tensor, train: WordGradients, terms: Tensor) -> None:
        """Add the terms of a block's gradient rows to the words that their tokens are parts of.

        Args:
            texts: the block.
            entry_of: (P,) the entry of each position of the texts.
            labels: (n_examples,) the label's number of each example.
            train: R gradient rows of the block.
            terms: (R, n_classes) float64.
        """
        occurrences = texts.ids * texts.n_examples + texts.examples
        keys = train.tokens * train.n_examples + train.examples
        row = torch.searchsorted(keys, occurrences).clamp(max=max(len(keys) - 1, 0))
        found = torch.nonzero(keys[row] == occurrences)[:, 0] if len(keys) else row[:0]
        row = row[found]
        times = torch.bincount(row, minlength=len(keys))
        self.sums.index_add_(0, entry_of[found], terms[row] / times[row, None])
        left = torch.nonzero((times == 0) & (terms != 0).any(1))[:, 0]
        own = [
            self._entries_of([token], label)[0]
            for token, label in zip(train.tokens[left].tolist(), labels[train.examples[left]].tolist(), strict=True)
        ]
        self._grow()
        self.sums.index_add_(0, torch.tensor(own, dtype=torch.long), terms[left])

    def table(self, classes: Groups, labels: Groups, n: int | None, min_examples: int) -> WordTable:
        """The n strongest words, or all (None), of those that enough training examples hold."""
        words = list(dict.fromkeys(word for word, _ in self.entries))
        places = {word: place for place, word in enumerate(words)}
        word_of = torch.tensor([places[word] for word, _ in self.entries], dtype=torch.long)
        label_of = torch.tensor([label for _, label in self.entries], dtype=torch.long)
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
            common=tuple(name in self.common for name in names),
        )

    def _entries_of(self, ids: Sequence[int], label: int, marks: Sequence[int] = ()) -> list[int]:
        """The entry of each token of an example; words that have none yet are given one."""
        entry_of = [0] * len(ids)
        for word in self.reader.words(ids, marks):
            entry = self.entries.setdefault((word.text, label), len(self.entries))
            for place in word.places:
                entry_of[place] = entry
            if word.special:
                self.special.add(word.text)
            if word.is_common:
                self.common.add(word.text)
        return entry_of

    def _grow(self) -> None:
        """Add zeros for the entries that are new."""
        new = len(self.entries) - len(self.counts)
        if new:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(new, self.sums.shape[1])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(new)])


def _summed(blocks: Sequence[WordGradients], classes: Groups) -> WordGradients:
    """One example for each class, whose row of a token is the sum of that token's rows in all test examples of it."""
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
    if len(sums) == 1:
        return sums[0]
    rows = torch.cat([each.directions * each.norms[:, None] for each in sums])
    examples, tokens = (torch.cat([getattr(each, name) for each in sums]) for name in ("examples", "tokens"))
    return WordGradients.from_positions(len(classes.names), examples, tokens, rows)


def _pieces(train: WordGradients, n_classes: int) -> Iterator[WordGradients]:
    """A block in pieces of so many rows that their products fit into memory, without a copy of the rows."""
    size = max(1, memory.NUMBERS_AT_ONCE // n_classes)
    for start in range(0, len(train.tokens), size):
        yield train.select(slice(start, start + size))
