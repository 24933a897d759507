"""The variants of Yeh et al. 2022, arXiv 2202.11844, section 4: all but synonyms through the public API."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.evidence.answers import network_with, word_gradients
from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.peers.synonyms import merged_words, paired_products, word_pairs
from lightning_tracin.gradients.sites import words_site


def with_synonyms(fitted: Fitted, least: float = 0.5) -> Tensor:
    """TracIn-WE-Syn, (n_test, n_train) float32: words are paired by the embeddings at the end of training.

    Args:
        fitted: what is asked.
        least: the smallest cosine of a pair of words.
    """
    checkpoints = fitted.trace.checkpoints
    networks = [network_with(fitted.module, checkpoint.weights()) for checkpoint in checkpoints]
    site = words_site(fitted.trace.sites)
    assert site is not None
    table = networks[-1].get_parameter(f"{site.layer}.weight").detach()
    test, train = fitted.task.test, fitted.task.train
    scores = torch.zeros(len(test), len(train))
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for checkpoint, network in zip(checkpoints, networks, strict=True):
        test_ids, test_gradients = merged_words(test.ids, word_gradients(network, site.layer, test))
        train_ids, train_gradients = merged_words(train.ids, word_gradients(network, site.layer, train))
        pairs = pairs or [word_pairs(ids, train_ids, table, least) for ids in test_ids]
        products = [
            paired_products(of_text, gradients, train_gradients)
            for of_text, gradients in zip(pairs, test_gradients, strict=True)
        ]
        scores += checkpoint.learning_rate_of(site) * torch.stack(products)
    return scores
