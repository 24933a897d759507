"""Parts of a training set, as masks of the examples that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import real_number, whole_number


def random_halves(n_train: int, n: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """Random parts of a training set, each of the same size, drawn without replacement.

    The first parts are the same however many are drawn, so that more can be retrained on later.

    Args:
        n_train: number of training examples.
        n: number of parts.
        share: of the training examples that is kept.
        seed: other parts for another one.

    Returns:
        (n, n_train) bool, True for the examples that are kept.

    Raises:
        ValueError: if a number is none of this kind, or if none or all of the examples would be in a part.

    Example:
        >>> halves = random_halves(6, 2)
        >>> halves.sum(1).tolist()
        [3, 3]
        >>> bool((halves == random_halves(6, 5)[:2]).all())
        True
    """
    n_train, n = whole_number("n_train", n_train, at_least=2), whole_number("n", n)
    share, seed = real_number("share", share, above=0, below=1), whole_number("seed", seed, at_least=0)
    n_kept = round(share * n_train)
    if not 0 < n_kept < n_train:
        raise ValueError(
            f"A share of {share} of {n_train} training examples keeps {n_kept}; it must keep some and leave some out."
        )
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(n, n_train, dtype=torch.bool)
    for row in kept:
        row[torch.randperm(n_train, generator=generator)[:n_kept]] = True
    return kept


def without(n_train: int, indices: Sequence[int] | Tensor) -> Tensor:
    """A training set without some of its examples.

    Args:
        n_train: number of training examples.
        indices: of those that are left out; none for the whole training set.

    Returns:
        (n_train,) bool, True for the examples that are kept.

    Raises:
        ValueError: if there is no such example, or if none would be left.

    Example:
        >>> without(5, [1, 3]).tolist()
        [True, False, True, False, True]
    """
    n_train = whole_number("n_train", n_train)
    left_out = torch.as_tensor(indices).reshape(-1)
    if len(left_out) and (left_out.dtype == torch.bool or left_out.is_floating_point() or left_out.is_complex()):
        raise ValueError(f"indices must be whole numbers from 0 to {n_train - 1}, but got {indices!r}.")
    left_out = left_out.long()
    bad = left_out[(left_out < 0) | (left_out >= n_train)]
    if len(bad):
        raise ValueError(f"There is no training example {int(bad[0])}; they are numbered from 0 to {n_train - 1}.")
    kept = torch.ones(n_train, dtype=torch.bool)
    kept[left_out] = False
    if not kept.any():
        raise ValueError(f"All {n_train} training examples would be left out: nothing could be trained on.")
    return kept


def checked_subsets(subsets: Tensor, n_train: int) -> Tensor:
    """Subsets as (m, n_train) bool, after a check that they are masks of this training set.

    Raises:
        ValueError: if they are not, or if one keeps no example.
    """
    if not isinstance(subsets, Tensor) or subsets.dtype != torch.bool or subsets.dim() not in (1, 2):
        got = f"{subsets.dtype} {tuple(subsets.shape)}" if isinstance(subsets, Tensor) else type(subsets).__name__
        raise ValueError(
            f"subsets must be a bool tensor of shape (m, n_train), True for what is kept, but got {got}. Make it by "
            "random_halves(n_train, n) or without(n_train, indices)."
        )
    subsets = subsets.reshape(-1, subsets.shape[-1]).cpu()
    if subsets.shape[1] != n_train:
        raise ValueError(f"subsets are of {subsets.shape[1]} training examples, but there are {n_train}.")
    if len(subsets) == 0 or not subsets.any(1).all():
        raise ValueError("There is no subset, or one keeps no example: nothing could be trained on.")
    return subsets
