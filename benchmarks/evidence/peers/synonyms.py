"""TracIn-WE-Syn (Yeh et al. 2022, arXiv 2202.11844): different words of one meaning are paired, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def merged_words(ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Each word's gradient in one place, the first at which it stands.

    Args:
        ids: (n, T) token ids, 0 where padded.
        gradients: (n, T, H) at the embedding layer's output.

    Returns:
        (n, T) ids with 0 at all but the first occurrences, and (n, T, H) sums over occurrences.

    Example:
        >>> ids, sums = merged_words(torch.tensor([[5, 6, 5]]), torch.tensor([[[1.0], [2.0], [4.0]]]))
        >>> ids.tolist(), sums.tolist()
        ([[5, 6, 0]], [[[5.0], [2.0], [0.0]]])
    """
    first = (ids[:, :, None] == ids[:, None]).int().argmax(2)
    sums = torch.zeros_like(gradients).scatter_add_(1, first[:, :, None].expand_as(gradients), gradients)
    is_first = (first == torch.arange(ids.shape[1])) & (ids != 0)
    return torch.where(is_first, ids, 0), sums * is_first[:, :, None]


def word_pairs(ids: Tensor, train_ids: Tensor, table: Tensor, least: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of words of one text with those of others.

    A word of one text is paired with a word of the other if each is the nearest to the other, by the cosine of their
    embeddings, so that words are paired one to one, and equal words with each other. (The paper's own rule was not at
    hand: this one is ours.)

    Args:
        ids: (T,) of :func:`merged_words`, one text.
        train_ids: (n_train, T') the same of training examples.
        table: (V, H) embeddings.
        least: the smallest cosine of a pair.

    Returns:
        For each pair the training example, the place of its word there, and that of the text's word.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> [each.tolist() for each in word_pairs(torch.tensor([3, 1]), torch.tensor([[2, 0], [2, 3]]), table)]
        [[0, 1, 1], [0, 0, 1], [1, 1, 0]]
    """
    places = torch.nonzero(ids)[:, 0]
    unit = functional.normalize(table)
    known, rows = torch.unique(train_ids, return_inverse=True)
    nearness = (unit[known] @ unit[ids[places]].T)[rows]
    nearness = nearness.masked_fill((train_ids == 0)[:, :, None], -2)  # (n_train, T', words)
    paired = (nearness >= nearness.amax(1, keepdim=True)) & (nearness >= nearness.amax(2, keepdim=True))
    examples, theirs, ours = torch.nonzero(paired & (nearness >= least), as_tuple=True)
    return examples, theirs, places[ours]


def paired_products(pairs: tuple[Tensor, Tensor, Tensor], gradients: Tensor, train_gradients: Tensor) -> Tensor:
    """The sum over pairs of words of the products of their gradients.

    Args:
        pairs: of :func:`word_pairs`.
        gradients: (T, H) of one text, of :func:`merged_words`.
        train_gradients: (n_train, T', H).

    Returns:
        (n_train,) float32.

    Example:
        >>> pairs = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1, 0])
        >>> paired_products(pairs, torch.tensor([[1.0], [5.0]]), torch.tensor([[[3.0], [2.0]]]))
        tensor([17.])
    """
    examples, theirs, ours = pairs
    products = (train_gradients[examples, theirs] * gradients[ours]).sum(1)
    return torch.zeros(len(train_gradients)).index_add_(0, examples, products)
