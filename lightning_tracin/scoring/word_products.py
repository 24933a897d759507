"""Products of word gradients: two blocks joined on the token, word by word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.gradients.word_gradients import WordGradients

# Rows that are multiplied at once: in full precision they fit into a cache.
_PIECE = 1024

# Words that no more test rows hold are multiplied many at once.
_FEW = 8


@full_precision()
def dot_words(test: WordGradients, train: WordGradients) -> Tensor:
    """Join two blocks, each sorted by token, on the token: (test.n_examples, train.n_examples).

    The rows of one word lie together. They are read as they are stored, a piece at a time that fits into a cache, and
    only rows that are multiplied reach the device of the test gradients.
    """
    scores = test.norms.new_zeros(train.n_examples, test.n_examples)
    shared = _shared_words(test.tokens.cpu(), train.tokens)
    few = (shared.n_test <= _FEW) & (shared.n_train <= _PIECE)
    _add_common(scores, shared.select(~few), test, train)
    _add_rare(scores, shared.select(few), test, train)
    return scores.T


def _add_common(scores: Tensor, words: _SharedWords, test: WordGradients, train: WordGradients) -> None:
    """Add the products of words that many examples hold: word by word."""
    n_test, hidden = test.n_examples, test.directions.shape[1]
    test_rows = test.directions.float() * test.factors[:, None]
    train_examples, factors = train.examples.to(scores.device), train.factors.to(scores.device)
    rows, products = scores.new_empty(_PIECE, hidden), scores.new_empty(_PIECE * n_test)
    for of_test, of_train in words.slices():
        columns, right = test.examples[of_test], test_rows[of_test]
        wide = 2 * len(columns) > n_test  # then adding whole rows of scores makes up for multiplying zeros
        if wide:
            right = scores.new_zeros(n_test, hidden).index_copy_(0, columns, right)
        for start in range(of_train.start, of_train.stop, _PIECE):
            piece = slice(start, min(start + _PIECE, of_train.stop))
            examples, n = train_examples[piece], piece.stop - piece.start
            left, out = _in_full(train.directions[piece], rows), products[: n * len(right)].view(n, -1)
            torch.mm(left, right.T, out=out).mul_(factors[piece, None])
            if wide:
                scores.index_add_(0, examples, out)
            else:
                scores.view(-1).index_add_(0, ((examples * n_test)[:, None] + columns).view(-1), out.view(-1))


def _add_rare(scores: Tensor, words: _SharedWords, test: WordGradients, train: WordGradients) -> None:
    """Add the products of words that few examples hold: many words in one batch of small matrices.

    The words of a batch have equally many test rows. Where one has fewer training rows than the others, its first one
    stands in for those that it lacks, and counts nothing.
    """
    words = words.select(torch.argsort(words.n_test * (_PIECE + 1) + words.n_train))
    batches = list(words.batches())
    n_words, _, widest = torch.tensor(batches, dtype=torch.long).view(-1, 3).T
    widths = torch.repeat_interleave(widest, n_words)
    word = torch.repeat_interleave(widths)
    number = torch.arange(len(word)) - (widths.cumsum(0) - widths)[word]
    lacks = number >= words.n_train[word]
    train_of = words.train_starts[word] + number.masked_fill_(lacks, 0)
    factors = train.factors[train_of].masked_fill_(lacks, 0)
    factors, places = factors.to(scores.device), (train.examples[train_of] * test.n_examples).to(scores.device)
    test_of = _ranges(words.test_starts, words.n_test).to(scores.device)
    left, columns = test.directions[test_of].float() * test.factors[test_of, None], test.examples[test_of]
    stored, rows = train.directions.new_empty(_PIECE, left.shape[1]), scores.new_empty(_PIECE, left.shape[1])
    of_test = of_train = 0
    for count, n_test, n_train in batches:
        tests = slice(of_test, of_test := of_test + count * n_test)
        trains = slice(of_train, of_train := of_train + count * n_train)
        n = count * n_train
        torch.index_select(train.directions, 0, train_of[trains], out=stored[:n])
        right = _in_full(stored[:n], rows).view(count, n_train, -1).transpose(1, 2)
        products = torch.bmm(left[tests].view(count, n_test, -1), right).mul_(factors[trains].view(count, 1, -1))
        where = columns[tests].view(count, -1, 1) + places[trains].view(count, 1, -1)
        scores.view(-1).index_add_(0, where.view(-1), products.view(-1))


def _in_full(directions: Tensor, rows: Tensor) -> Tensor:
    """Directions in full precision, on the device of ``rows``: themselves, or the first of ``rows``."""
    directions = directions.to(rows.device)
    return directions if directions.dtype == torch.float32 else rows[: len(directions)].copy_(directions)


@dataclass(frozen=True)
class _SharedWords:
    """The words that two blocks, each sorted by token, share, and where either holds their rows; all (W,) int64."""

    test_starts: Tensor
    n_test: Tensor
    train_starts: Tensor
    n_train: Tensor

    def select(self, words: Tensor) -> _SharedWords:
        """Some of the words, by a mask (W,)."""
        return _SharedWords(self.test_starts[words], self.n_test[words], self.train_starts[words], self.n_train[words])

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Each word's rows on the test and on the training side."""
        numbers = torch.stack([self.test_starts, self.n_test, self.train_starts, self.n_train], 1).tolist()
        for test, n_test, train, n_train in numbers:
            yield slice(test, test + n_test), slice(train, train + n_train)

    def batches(self) -> Iterator[tuple[int, int, int]]:
        """Cut words, sorted by their numbers of rows, into batches of at most ``_PIECE`` training rows.

        Yields:
            Number of words, of each one's test rows, and of the training rows of that with the most.
        """
        n_test, n_train = self.n_test.tolist(), self.n_train.tolist()
        start = 0
        for stop in range(1, len(n_test) + 1):
            fits = stop < len(n_test) and n_test[stop] == n_test[start] and (stop + 1 - start) * n_train[stop] <= _PIECE
            if not fits:
                yield stop - start, n_test[start], n_train[stop - 1]
                start = stop


def _shared_words(test_tokens: Tensor, train_tokens: Tensor) -> _SharedWords:
    """The words that two sorted columns of tokens share."""
    unique, counts = torch.unique_consecutive(test_tokens, return_counts=True)
    train_unique, train_counts = torch.unique_consecutive(train_tokens, return_counts=True)
    _, in_test, in_train = _intersection(unique, train_unique)
    starts, train_starts = counts.cumsum(0) - counts, train_counts.cumsum(0) - train_counts
    return _SharedWords(starts[in_test], counts[in_test], train_starts[in_train], train_counts[in_train])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers from each start on, one range after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


def _intersection(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of two sorted tensors without repetitions: what both hold, and where each holds it."""
    common = a[torch.isin(a, b, assume_unique=True)]
    return common, torch.searchsorted(a, common), torch.searchsorted(b, common)
