"""Labels and words alone, without a model: same label, TF-IDF, BM25, chance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def agreement(test_labels: Tensor, train_labels: Tensor, otherwise: float = -1.0) -> Tensor:
    """1 where the labels agree, and another number elsewhere.

    Args:
        test_labels: (n_test,) classes.
        train_labels: (n_train,) classes.
        otherwise: the number where they don't.

    Returns:
        (n_test, n_train) float32.

    Example:
        >>> agreement(torch.tensor([0, 1]), torch.tensor([1, 1, 0])).tolist()
        [[-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]]
    """
    return torch.where(test_labels[:, None] == train_labels, 1.0, otherwise)


def word_counts(*texts: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """How often each word occurs in each text.

    Args:
        texts: for each set of texts the token ids, (n, T), and a mask of the same shape that is true where they count
            (neither padding nor special tokens).

    Returns:
        For each set (n, V) float32, V the number of words that occur in any.

    Example:
        >>> ids, mask = torch.tensor([[7, 9, 9, 0]]), torch.tensor([[True, True, True, False]])
        >>> word_counts((ids, mask))[0].tolist()
        [[1.0, 2.0]]
    """
    known = torch.unique(torch.cat([ids[mask] for ids, mask in texts]))
    counts = []
    for ids, mask in texts:
        columns = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        counts.append(torch.zeros(len(ids), len(known)).scatter_add_(1, columns, mask.float()))
    return tuple(counts)


def tf_idf_cosine(test: Tensor, train: Tensor) -> Tensor:
    """The cosine of TF-IDF vectors, (1 + log count) x (1 + log((1 + n) / (1 + texts with the word))).

    Args:
        test: (n_test, V) counts.
        train: (n_train, V) counts; the texts with a word are counted here.

    Returns:
        (n_test, n_train) float32; 0 where a text has no words.

    Example:
        >>> tf_idf_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5797]])
    """
    idf = 1 + ((1 + len(train)) / (1 + (train > 0).sum(0))).log()
    test, train = (
        functional.normalize(torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0.0) * idf)
        for counts in (test, train)
    )
    return test @ train.T


def bm25(test: Tensor, train: Tensor, k1: float = 1.5, b: float = 0.75) -> Tensor:
    """Okapi BM25 (Robertson and Zaragoza 2009), with a test text as the query and training texts as the documents.

    Args:
        test: (n_test, V) counts; each word of a query counts once.
        train: (n_train, V) counts.
        k1: how soon further occurrences of a word cease to count.
        b: how much long documents are marked down.

    Returns:
        (n_test, n_train) float32, at least 0 (with log(1 + ...) in the idf, as Lucene has it).

    Example:
        >>> bm25(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.6931, 0.0000]])
    """
    holding = (train > 0).sum(0)
    idf = (1 + (len(train) - holding + 0.5) / (holding + 0.5)).log()
    lengths = train.sum(1, keepdim=True)
    saturated = train * (k1 + 1) / (train + k1 * (1 - b + b * lengths / lengths.mean()))
    return (test > 0).float() @ (saturated * idf).T


def chance(n_test: int, n_train: int, seed: int = 0) -> Tensor:
    """Random scores, (n_test, n_train) float32."""
    return torch.randn(n_test, n_train, generator=torch.Generator().manual_seed(seed))
