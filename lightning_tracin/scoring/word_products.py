"""Dot products of word gradients: two blocks, joined on the token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tracin.gradients.precision import full_precision
from lightning_tracin.gradients.word_gradients import WordGradients

# Training rows that are multiplied at once: in float32 they fit into the CPU's cache.
_CHUNK = 1024

# Words with at most this many test rows are multiplied in batches of many words.
_FEW_ROWS = 8


@full_precision()
def dot_words(test: WordGradients, train: WordGradients) -> Tensor:
    """(test.n_examples, train.n_examples) dot products of two blocks, each sorted by token.

    The rows of one word are contiguous. They are converted to float32 in chunks that fit into a cache, and only rows of
    words that both blocks have are moved to the device of the test gradients.
    """
    scores = test.norms.new_zeros(train.n_examples, test.n_examples)
    if not len(test.tokens) or not len(train.tokens):
        return scores.T
    shared = _shared_words(test.tokens.cpu(), train.tokens)
    is_rare = (shared.n_test <= _FEW_ROWS) & (shared.n_train <= _CHUNK)
    _add_common(scores, shared.select(~is_rare), test, train)
    _add_rare(scores, shared.select(is_rare), test, train)
    return scores.T


def _add_common(scores: Tensor, words: _SharedWords, test: WordGradients, train: WordGradients) -> None:
    """Add the products of words that occur in many examples, one word at a time."""
    n_test, hidden = test.n_examples, test.directions.shape[1]
    test_rows = test.directions.float() * test.factors[:, None]
    train_examples, factors = train.examples.to(scores.device), train.factors.to(scores.device)
    rows, products = scores.new_empty(_CHUNK, hidden), scores.new_empty(_CHUNK * n_test)
    for test_slice, train_slice in words.slices():
        columns, right = test.examples[test_slice], test_rows[test_slice]
        # If most test examples have the word, zeros for the others make it possible to add full rows of scores.
        is_dense = 2 * len(columns) > n_test
        if is_dense:
            right = scores.new_zeros(n_test, hidden).index_copy_(0, columns, right)
        for start in range(train_slice.start, train_slice.stop, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, train_slice.stop))
            examples, n = train_examples[chunk], chunk.stop - chunk.start
            left, out = _in_float32(train.directions[chunk], rows), products[: n * len(right)].view(n, -1)
            torch.mm(left, right.T, out=out).mul_(factors[chunk, None])
            if is_dense:
                scores.index_add_(0, examples, out)
            else:
                scores.view(-1).index_add_(0, ((examples * n_test)[:, None] + columns).view(-1), out.view(-1))


def _add_rare(scores: Tensor, words: _SharedWords, test: WordGradients, train: WordGradients) -> None:
    """Add the products of words that occur in few examples, many words in one batched matrix product.

    The words of a batch have equally many test rows. A word with fewer training rows than the others is padded with
    its first row, multiplied by 0.
    """
    words = words.select(torch.argsort(words.n_test * (_CHUNK + 1) + words.n_train))
    batches = list(words.batches())
    n_words, _, batch_widths = torch.tensor(batches, dtype=torch.long).view(-1, 3).T
    # The padded training rows of all words, one word after the other.
    widths = torch.repeat_interleave(batch_widths, n_words)
    word = torch.repeat_interleave(widths)
    place_in_word = torch.arange(len(word)) - (widths.cumsum(0) - widths)[word]
    is_padding = place_in_word >= words.n_train[word]
    train_rows = words.train_starts[word] + place_in_word.masked_fill_(is_padding, 0)
    factors = train.factors[train_rows].masked_fill_(is_padding, 0)
    factors, offsets = factors.to(scores.device), (train.examples[train_rows] * test.n_examples).to(scores.device)
    test_rows = _ranges(words.test_starts, words.n_test).to(scores.device)
    left, columns = test.directions[test_rows].float() * test.factors[test_rows, None], test.examples[test_rows]
    stored, rows = train.directions.new_empty(_CHUNK, left.shape[1]), scores.new_empty(_CHUNK, left.shape[1])
    test_start = train_start = 0
    for count, n_test, n_train in batches:
        test_slice = slice(test_start, test_start := test_start + count * n_test)
        train_slice = slice(train_start, train_start := train_start + count * n_train)
        n = count * n_train
        torch.index_select(train.directions, 0, train_rows[train_slice], out=stored[:n])
        right = _in_float32(stored[:n], rows).view(count, n_train, -1).transpose(1, 2)
        products = torch.bmm(left[test_slice].view(count, n_test, -1), right)
        products.mul_(factors[train_slice].view(count, 1, -1))
        flat_indices = columns[test_slice].view(count, -1, 1) + offsets[train_slice].view(count, 1, -1)
        scores.view(-1).index_add_(0, flat_indices.view(-1), products.view(-1))


def _in_float32(directions: Tensor, rows: Tensor) -> Tensor:
    """Directions in float32 on the device of ``rows``; ``rows`` is the memory for converted ones."""
    directions = directions.to(rows.device)
    return directions if directions.dtype == torch.float32 else rows[: len(directions)].copy_(directions)


@dataclass(frozen=True)
class _SharedWords:
    """The W words that two blocks, each sorted by token, share, and the places of their rows.

    Attributes:
        test_starts: (W,) int64, the first test row of each word.
        n_test: (W,) int64, the number of its test rows.
        train_starts: (W,) int64, the first training row of each word.
        n_train: (W,) int64, the number of its training rows.
    """

    test_starts: Tensor
    n_test: Tensor
    train_starts: Tensor
    n_train: Tensor

    def select(self, words: Tensor) -> _SharedWords:
        """Some of the words, by a mask (W,) or by their numbers."""
        return _SharedWords(self.test_starts[words], self.n_test[words], self.train_starts[words], self.n_train[words])

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Yield each word's rows on the test side and on the training side."""
        numbers = torch.stack([self.test_starts, self.n_test, self.train_starts, self.n_train], 1).tolist()
        for test_start, n_test, train_start, n_train in numbers:
            yield slice(test_start, test_start + n_test), slice(train_start, train_start + n_train)

    def batches(self) -> Iterator[tuple[int, int, int]]:
        """Divide words, sorted by their numbers of test and training rows, into batches of at most ``_CHUNK`` rows.

        Yields:
            The number of words in a batch, the number of test rows of each of them, and the largest number of training
            rows of any of them.
        """
        n_test, n_train = self.n_test.tolist(), self.n_train.tolist()
        start = 0
        for stop in range(1, len(n_test) + 1):
            fits = stop < len(n_test) and n_test[stop] == n_test[start] and (stop + 1 - start) * n_train[stop] <= _CHUNK
            if not fits:
                yield stop - start, n_test[start], n_train[stop - 1]
                start = stop


def _shared_words(test_tokens: Tensor, train_tokens: Tensor) -> _SharedWords:
    """The words that two sorted columns of tokens share, with the places of their rows."""
    unique, counts = torch.unique_consecutive(test_tokens, return_counts=True)
    train_unique, train_counts = torch.unique_consecutive(train_tokens, return_counts=True)
    _, in_test, in_train = _intersection(unique, train_unique)
    starts, train_starts = counts.cumsum(0) - counts, train_counts.cumsum(0) - train_counts
    return _SharedWords(starts[in_test], counts[in_test], train_starts[in_train], train_counts[in_train])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The concatenation of ranges, each given by its start and length; int64."""
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - offsets, lengths)


def _intersection(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The common values of two sorted tensors of distinct values, and their places in each of the two."""
    common = a[torch.isin(a, b, assume_unique=True)]
    return common, torch.searchsorted(a, common), torch.searchsorted(b, common)
