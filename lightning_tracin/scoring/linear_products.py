"""Dot products of gradients at a linear layer, given as two factors for each position or as matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tracin.gradients import memory
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.precision import full_precision


@full_precision()
def dot_factors(test: FactorGradients, train: FactorGradients) -> Tensor:
    """(test.n_examples, train.n_examples) dot products of gradients that are given by factors.

    The product of two examples is Σ_{t,t'} (h_t · h'_t')(δ_t · δ'_t'), which needs no matrix. It is computed for a
    chunk of the training positions at a time, on the device of the test gradients.
    """
    scores = test.delta_norms.new_zeros(train.n_examples, test.n_examples)
    test_inputs, test_deltas = test.scaled_inputs, test.scaled_deltas
    size = max(1, memory.NUMBERS_AT_ONCE // max(len(test.examples), 1))
    for start in range(0, len(train.examples), size):
        chunk = train.select(slice(start, start + size)).to(scores.device)
        products = (chunk.scaled_inputs @ test_inputs.T) * (chunk.scaled_deltas @ test_deltas.T)
        by_test = scores.new_zeros(len(products), test.n_examples).index_add_(1, test.examples, products)
        scores.index_add_(0, chunk.examples, by_test)
    return scores.T


@full_precision()
def dot_weighted_factors(test: FactorGradients, train: FactorGradients, weights: Tensor) -> Tensor:
    """(test.n_examples, train.n_examples) products Σ weights · G · G', with weights (out, in).

    The weights rule out the product of the factors, so the matrices G are formed for a group of examples at a time.
    """
    device = test.delta_norms.device
    scores = torch.zeros(test.n_examples, train.n_examples, dtype=torch.float32, device=device)
    flat = weights.to(device).float().flatten()
    for test_examples, test_matrices in test.to(torch.device("cpu")).matrices():
        left = test_matrices.flatten(1).to(device, torch.float32) * flat
        for train_examples, train_matrices in train.matrices():
            products = left @ train_matrices.flatten(1).to(device, torch.float32).T
            scores[test_examples.to(device)[:, None], train_examples.to(device)] = products
    return scores


@full_precision()
def dot_matrices(test: MatrixGradients, train: MatrixGradients, weights: Tensor | None) -> Tensor:
    """(test.n_examples, train.n_examples) products Σ weights · G · G', with weights (out, in), or None for 1."""
    scores = test.norms.new_zeros(test.n_examples, train.n_examples)
    left = test.directions.float() * test.factors[:, None]
    if weights is not None:
        left = left * weights.to(left.device).float().flatten()
    size = max(1, memory.NUMBERS_AT_ONCE // max(left.shape[1], 1))
    for start in range(0, len(train.examples), size):
        chunk = train.select(slice(start, start + size)).to(scores.device)
        products = (left @ chunk.directions.float().T) * chunk.factors
        scores[test.examples[:, None], chunk.examples] = products
    return scores
