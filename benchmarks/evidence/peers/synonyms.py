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


def paired_products(  # one test example with all training examples
    test: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor], table: Tensor, least: float = 0.5
) -> Tensor:
    """The sum over pairs of words of the products of their gradients.

    A word of one text is paired with a word of the other if each is the nearest to the other, by the cosine of their
    embeddings, so that words are paired one to one, and equal words with each other. (The paper's own rule was not at
    hand: this one is ours.)

    Args:
        test: ids (T,) and gradients (T, H) of one example, of :func:`merged_words`.
        train: the same of training examples, (n_train, T') and (n_train, T', H).
        table: (V, H) embeddings.
        least: the smallest cosine of a pair.

    Returns:
        (n_train,) float32.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> one, two = torch.tensor([1, 3]), torch.tensor([[2, 0]])
        >>> paired_products((one, torch.tensor([[1.0], [5.0]])), (two, torch.tensor([[[3.0], [0.0]]])), table)
        tensor([3.])
    """
    (ids, gradients), (train_ids, train_gradients) = test, train
    kept = ids != 0
    ids, gradients = ids[kept], gradients[kept]
    unit = functional.normalize(table)
    nearness = (unit[train_ids.unique()] @ unit[ids].T)[torch.searchsorted(train_ids.unique(), train_ids)]
    nearness = nearness.masked_fill((train_ids == 0)[:, :, None], -2)  # (n_train, T', words)
    mutual = (nearness >= nearness.amax(1, keepdim=True)) & (nearness >= nearness.amax(2, keepdim=True))
    mutual &= nearness >= least
    return (mutual * (train_gradients @ gradients.T)).sum((1, 2))
