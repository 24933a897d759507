"""Rows of the scores, and the test examples that they are of: a row is a place in a result, not in the data set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tracin.checked_numbers import index_of
from lightning_tracin.gradients.printable import enumerated

_NAMED = 8  # test examples that a message names


def checked_row(asked: Any, test_indices: Tensor) -> int:
    """A row that is asked for.

    Args:
        asked: a whole number, also of a tensor.
        test_indices: (n_test,) the index in its data set of each row's test example.

    Raises:
        IndexError: if there is no such row.
    """
    row = index_of(asked)
    if row is None or not 0 <= row < len(test_indices):
        raise IndexError(f"There are {rows_in_words(test_indices)}, but got {asked!r}.")
    return row


def rows_in_words(test_indices: Tensor) -> str:
    """The rows that there are, and whose they are.

    Example:
        >>> import torch
        >>> rows_in_words(torch.tensor([3, 5, 7])), rows_in_words(torch.arange(4))
        ('rows 0 to 2 (test examples 3, 5, 7 of the data set)', 'rows 0 to 3 (test examples 0 to 3 of the data set)')
    """
    numbers = test_indices.tolist()
    is_run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    named = f"{numbers[0]} to {numbers[-1]}" if is_run else enumerated(numbers, _NAMED)
    return f"rows 0 to {len(numbers) - 1} (test examples {named} of the data set)"
