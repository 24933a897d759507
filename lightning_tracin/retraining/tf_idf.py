"""Likeness of texts by the words that they share, without any model: the baseline of whoever explains by examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.texts import Texts

_BLOCK = 64  # test texts whose words are spread over the vocabulary at once


def tf_idf_cosines(test: Texts, train: Texts) -> Tensor:
    """The cosine of each test text with each training text, a token's count weighed by how few training texts have it.

    The weight is that of scikit-learn, ln((1 + n) / (1 + n_with)) + 1, of n training texts of which n_with hold the
    token.

    Args:
        test: token ids of n_test texts.
        train: token ids of n_train texts.

    Returns:
        (n_test, n_train) float32, from 0 to 1; 0 for a text without tokens.

    Example:
        >>> def of(*texts):
        ...     ids = torch.tensor([token for text in texts for token in text])
        ...     owners = torch.tensor([number for number, text in enumerate(texts) for _ in text])
        ...     return Texts(len(texts), owners, ids, torch.zeros(len(texts)))
        >>> tf_idf_cosines(of([5, 7]), of([5, 7], [5, 5], [5, 9]))
        tensor([[1.0000, 0.5085, 0.2586]])
    """
    vocabulary = int(torch.cat([test.ids, train.ids, torch.zeros(1, dtype=torch.long)]).max()) + 1
    counted, n_each = torch.unique(train.examples * vocabulary + train.ids, return_counts=True)
    owners, tokens = counted // vocabulary, counted % vocabulary
    weights = ((1 + train.n_examples) / (1 + torch.bincount(tokens, minlength=vocabulary))).log() + 1
    values = n_each * weights[tokens]
    squares = torch.zeros(train.n_examples).index_add_(0, owners, values.square())
    values = values / squares.sqrt()[owners]
    cosines = torch.zeros(test.n_examples, train.n_examples)
    for start in range(0, test.n_examples, _BLOCK):
        spread = _spread(test, range(start, min(start + _BLOCK, test.n_examples)), weights)
        cosines[start : start + _BLOCK].index_add_(1, owners, spread[:, tokens] * values)
    return cosines


def _spread(texts: Texts, examples: range, weights: Tensor) -> Tensor:
    """(len(examples), vocabulary) weighted counts of some texts, each of length 1."""
    is_in = (texts.examples >= examples.start) & (texts.examples < examples.stop)
    counts = torch.zeros(len(examples), len(weights))
    ones = torch.ones(int(is_in.sum()))
    counts.index_put_((texts.examples[is_in] - examples.start, texts.ids[is_in]), ones, accumulate=True)
    return nn.functional.normalize(counts * weights)
