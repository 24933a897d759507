from __future__ import annotations

import pytest
import torch
from random_gradients import dense, random_linear, random_words

from lightning_tracin.gradients.rows import unit_rows
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-25, 1e25])
def test_unit_rows_recover_rows_of_any_size(scale):
    rows = torch.randn(7, 5) * scale
    norms, directions = unit_rows(rows)
    torch.testing.assert_close(norms[:, None] * directions, rows, rtol=1e-5, atol=0)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(7))


def test_unit_rows_keep_a_row_of_zeros():
    norms, directions = unit_rows(torch.zeros(2, 3))
    assert norms.tolist() == [0, 0]
    assert not directions.any()


def test_rows_of_a_token_that_occurs_twice_are_summed():
    words, table = random_words(8, vocabulary=4)  # nine positions, four tokens: every example repeats some
    torch.testing.assert_close(dense(words, 4), table, rtol=1e-5, atol=1e-6)
    assert len(set(zip(words.examples.tolist(), words.tokens.tolist(), strict=True))) == len(words.tokens)


def test_words_whose_gradient_is_zero_are_left_out():
    words = WordGradients.from_positions(1, torch.tensor([0, 0]), torch.tensor([3, 5]), torch.tensor([[0.0], [2.0]]))
    assert words.tokens.tolist() == [5]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_words_are_those_of_largest_norm(k):
    words, table = random_words(6)
    norms = table.norm(dim=2)
    kept = words.top_words(k)
    for example in range(6):
        expected = set(norms[example].topk(min(k, int((norms[example] > 0).sum()))).indices.tolist())
        assert set(kept.tokens[kept.examples == example].tolist()) == expected


@pytest.mark.parametrize("make", [random_words, lambda n: random_linear(n, 3)], ids=["words", "linear"])
def test_blocks_can_be_cut_joined_and_arranged(make):
    block, _ = make(7)
    whole = type(block).cat([block.slice(0, 2), block.slice(2, 7)])
    torch.testing.assert_close(whole.example_norms(), block.example_norms())
    places = torch.tensor([2, -1, 0, 1, -1, 4, 3])
    arranged = block.arranged(places, 5)
    assert arranged.n_examples == 5
    torch.testing.assert_close(arranged.example_norms()[places[places >= 0]], block.example_norms()[places >= 0])


def test_texts_can_be_cut_joined_and_arranged():
    texts = Texts(3, torch.tensor([0, 0, 1, 2]), torch.tensor([7, 8, 9, 5]), torch.tensor([1.0, torch.nan, 2.0]))
    joined = Texts.cat([texts.slice(0, 1), texts.slice(1, 3)])
    assert [joined.ids_of(i) for i in range(3)] == [[7, 8], [9], [5]]
    assert [joined.label_of(i) for i in range(3)] == [1.0, None, 2.0]
    arranged = texts.arranged(torch.tensor([1, -1, 0]), 2)
    assert [arranged.ids_of(i) for i in range(2)] == [[5], [7, 8]]
    assert [arranged.label_of(i) for i in range(2)] == [2.0, 1.0]


def test_norms_of_tiny_gradients_do_not_vanish():
    words, table = random_words(4, scale=1e-25)
    torch.testing.assert_close(words.example_norms().double(), table.flatten(1).norm(dim=1), rtol=1e-4, atol=0)
