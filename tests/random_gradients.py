"""Random gradients beside dense tables of the same."""

from __future__ import annotations

import torch

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.word_gradients import WordGradients

# Words that few or many test examples hold, with few or many training rows, in more than one piece.
JOINS = [(6, 11, 30), (40, 50, 3), (1, 1, 200), (3, 4, 1), (3, 500, 4), (40, 300, 20), (40, 900, 150), (5, 2500, 2)]
JOINS += [(20, 2500, 3), (40, 4000, 20), (2, 5000, 400)]


def dense(words: WordGradients, vocabulary: int) -> torch.Tensor:
    """(n_examples, vocabulary, H) float64."""
    table = torch.zeros(words.n_examples, vocabulary, words.directions.shape[1], dtype=torch.float64)
    table[words.examples, words.tokens] = words.factors[:, None].double() * words.directions.double()
    return table


def random_words(n_examples: int, vocabulary: int = 30, length: int = 9, hidden: int = 6, scale: float = 1.0):
    owners = torch.arange(n_examples).repeat_interleave(length)
    tokens = torch.randint(vocabulary, (n_examples * length,))
    gradients = torch.randn(n_examples * length, hidden) * scale
    table = torch.zeros(n_examples, vocabulary, hidden, dtype=torch.float64)
    table.index_put_((owners, tokens), gradients.double(), accumulate=True)
    return WordGradients.from_positions(n_examples, owners, tokens, gradients), table


def random_linear(n_examples: int, positions: int, inputs: int = 5, outputs: int = 4):
    owners = torch.arange(n_examples).repeat_interleave(positions)
    h, delta = torch.randn(len(owners), inputs), torch.randn(len(owners), outputs)
    table = torch.zeros(n_examples, outputs, inputs, dtype=torch.float64)
    table.index_add_(0, owners, torch.einsum("po,pi->poi", delta, h).double())
    return FactorGradients.from_positions(n_examples, owners, h, delta), table
