"""Products of gradients against those of dense tables."""

from __future__ import annotations

import pytest
import torch
from random_gradients import JOINS, dense, random_linear, random_words

from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.scoring.methods import TracInLast, TracInWE


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("n_test", "n_train", "vocabulary"), JOINS)
def test_joining_words_equals_dense_products(n_test, n_train, vocabulary, dtype):
    method = TracInWE()
    test, test_table = random_words(n_test, vocabulary)
    train, _ = random_words(n_train, vocabulary)
    train = train.as_dtype(dtype)
    scores = method.dot(method.prepare(test, None, "test"), method.prepare(train, None, "train"), None)
    expected = torch.einsum("avh,bvh->ab", test_table, dense(train, vocabulary))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_examples_without_a_common_word_score_zero():
    method = TracInWE()
    test = WordGradients.from_positions(1, torch.tensor([0]), torch.tensor([1]), torch.ones(1, 2))
    train = WordGradients.from_positions(1, torch.tensor([0]), torch.tensor([2]), torch.ones(1, 2))
    assert method.dot(test, train, None).tolist() == [[0.0]]


@pytest.mark.parametrize("positions", [1, 4])
def test_linear_products_equal_products_of_dense_gradients(positions):
    method = TracInLast()
    test, test_table = random_linear(3, positions)
    train, train_table = random_linear(5, positions)
    expected = torch.einsum("aoi,boi->ab", test_table, train_table)
    torch.testing.assert_close(method.dot(test, train, None).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(train.example_norms().double(), train_table.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


def test_gradients_too_small_to_be_normalised_count_nothing():
    method = TracInWE(normalize="cosine")
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 1e-39
    words = method.prepare(
        WordGradients.from_positions(2, torch.tensor([0, 1]), torch.tensor([5, 5]), rows), None, "test"
    )
    assert method.dot(words, words, None).tolist() == [[0, 0], [0, 0]]
