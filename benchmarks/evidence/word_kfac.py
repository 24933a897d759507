"""K-FAC for the word table, as a trial: the product has it for linear layers alone, since here it does not help.

The input of an embedding layer is a word as a one-hot vector, whose covariance is diagonal: how often each word comes.
So the factors are those frequencies, and the covariance of the gradients at the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.evidence.answers import answers, network_with, word_gradients
from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.peers.synonyms import merged_words, paired_products
from lightning_tracin.gradients.sites import words_site


def word_kfac(fitted: Fitted, *, frequencies: bool = True, hidden: bool = True) -> Tensor:
    """Cosines of preconditioned word gradients, checkpoints weighted by residuals, (n_test, n_train) float32.

    Args:
        fitted: what is asked.
        frequencies: whether rare words count more.
        hidden: whether gradients are whitened by their covariance.
    """
    site = words_site(fitted.trace.sites)
    assert site is not None
    test, train = fitted.task.test, fitted.task.train
    total = torch.zeros(len(test), len(train))
    for checkpoint in fitted.trace.checkpoints:
        network = network_with(fitted.module, checkpoint.weights())
        at_test, at_train = (word_gradients(network, site.layer, each) for each in (test, train))
        by_word, by_hidden = factors(train.ids, at_train, n_words=int(max(test.ids.max(), train.ids.max())) + 1)
        if not frequencies:
            by_word = torch.ones_like(by_word)
        if not hidden:
            by_hidden = torch.eye(len(by_hidden))
        sides = [whitened(each.ids, at, by_word, by_hidden) for each, at in ((test, at_test), (train, at_train))]
        said = answers(network, train)
        residual = 1 - said.probabilities[range(len(train)), said.labels]
        total += residual.mean().sqrt() * shared_products(sides[0], sides[1])
    return total


def factors(ids: Tensor, gradients: Tensor, n_words: int, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """The inverse roots of both covariances over positions, each with a share of its mean eigenvalue added.

    Args:
        ids: (n, T) token ids, 0 where padded.
        gradients: (n, T, H) at the embedding layer's output.
        n_words: V, of the table.
        damping: that share.

    Returns:
        (V,) and (H, H).

    Example:
        >>> factors(torch.tensor([[1, 1]]), torch.tensor([[[1.0], [3.0]]]), n_words=2, damping=0.5)
        (tensor([2.0000, 0.8944]), tensor([[0.3651]]))
    """
    held = ids != 0
    counts = torch.bincount(ids[held], minlength=n_words).float()
    frequencies = counts / counts.sum()
    rows = gradients[held]
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return (
        (frequencies + damping * frequencies.mean()).rsqrt(),
        (vectors * (values + damping * values.mean()).rsqrt()) @ vectors.T,
    )


def whitened(ids: Tensor, gradients: Tensor, by_word: Tensor, by_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's words once, and their gradients multiplied by both factors and divided by the example's norm.

    Args:
        ids: (n, T) token ids, 0 where padded.
        gradients: (n, T, H) at the embedding layer's output.
        by_word: (V,) of :func:`factors`.
        by_hidden: (H, H) the same.

    Returns:
        (n, T) ids and (n, T, H) gradients, as :func:`merged_words` has them.
    """
    words, sums = merged_words(ids, gradients)
    products = sums * by_word[words][:, :, None] @ by_hidden
    return words, functional.normalize(products.flatten(1)).view_as(products)


def shared_products(test: Sequence[Tensor], train: Sequence[Tensor]) -> Tensor:
    """The sum over shared words of the products of two sides' gradients, (n_test, n_train).

    Args:
        test: (n_test, T) ids, each word once and 0 elsewhere, and (n_test, T, H) gradients.
        train: the same of training examples.
    """
    (test_ids, test_gradients), (train_ids, train_gradients) = test, train
    n_words = int(max(test_ids.max(), train_ids.max())) + 1
    rows = []
    for ids, gradients in zip(test_ids, test_gradients, strict=True):
        place_of = torch.full((n_words,), -1)
        place_of[ids] = torch.arange(len(ids))
        place_of[0] = -1
        places = place_of[train_ids]
        examples, positions = torch.nonzero(places >= 0, as_tuple=True)
        pairs = examples, positions, places[examples, positions]
        rows.append(paired_products(pairs, gradients, train_gradients))
    return torch.stack(rows)
