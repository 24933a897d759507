"""How many of the words that are shown as reasons say nothing?"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tracin.metrics.functional.checks import check_whole

PADDING = -1


def _common_word_share_update(words: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """How many words of a batch are common, and how many there are."""
    check_whole("words", words, "(n_pairs, n_words)", (2,))
    is_word = words != PADDING
    return (torch.isin(words, common) & is_word).sum(), is_word.sum()


def _common_word_share_compute(is_common: Tensor, total: Tensor) -> Tensor:
    if total == 0:
        raise ValueError("Argument `words` expected to hold a word, but got nothing but the padding -1.")
    return is_common / total


def common_word_share(words: Tensor, common: Tensor) -> Tensor:
    """The share of stop words, punctuation and special tokens among the words that explain pairs of examples.

    An explanation by such words may be exact, and still tell a reader nothing. It is no measure of truth: compare
    methods by it where they do equally well by others.

    Args:
        words: (n_pairs, n_words) int, ids of the words of largest influence of each pair; -1 where a pair has fewer.
        common: (n_common,) int, ids of the words that say nothing.

    Raises:
        TypeError: a tensor is not of integers.
        ValueError: a shape is another, or there is no word.

    Returns:
        A scalar from 0 to 1.

    Example:
        >>> ids = {word: id for id, word in enumerate(["the", ".", "[CLS]", "goal", "striker"])}
        >>> words = torch.tensor([[ids["goal"], ids["the"]], [ids["striker"], -1]])
        >>> common_word_share(words, common=torch.tensor([ids["the"], ids["."], ids["[CLS]"]]))
        tensor(0.3333)
    """
    check_whole("common", common, "(n_common,)", (1,))
    return _common_word_share_compute(*_common_word_share_update(words, common))
