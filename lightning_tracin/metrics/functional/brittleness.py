"""Brittleness: how few examples need to be removed until the model says something else?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tracin.metrics.functional.bootstrap import Interval, bootstrap_interval
from lightning_tracin.metrics.functional.checks import check_length, check_whole, growing_ks


class BrittlenessResult(NamedTuple):
    """How many examples carry a prediction.

    Attributes:
        smallest: (n_test,) float32, the smallest of ``ks`` that flips the prediction; infinite where none does.
        share: (n_k,) share of the test examples that have flipped at that many removed examples or fewer.
        interval: of ``share``, (n_k,) each, over test examples.
    """

    smallest: Tensor
    share: Tensor
    interval: Interval


def _brittleness_update(predictions: Tensor, reference: Tensor, ks: Sequence[int]) -> Tensor:
    """The smallest k (b,) of each test example."""
    check_whole("predictions", predictions, "(n_test, n_k) or (n_test, n_seeds, n_k)", (2, 3))
    check_whole("reference", reference, "(n_test,)", (1,))
    check_length("predictions", predictions.shape[-1], len(ks), "numbers of removed examples of `ks`")
    check_length("reference", len(reference), len(predictions), "test examples of `predictions`")
    predictions = predictions.unsqueeze(1) if predictions.ndim == 2 else predictions
    differs = predictions != reference.view(-1, 1, 1)
    flips = differs.float().mean(1) > 0.5
    counts = torch.tensor(ks, dtype=torch.float32, device=flips.device)
    return counts.where(flips, torch.full_like(counts, torch.inf)).amin(1)


def _brittleness_compute(
    smallest: Tensor, ks: Sequence[int], level: float, resamples: int, seed: int
) -> BrittlenessResult:
    has_flipped = (smallest.unsqueeze(1) <= torch.tensor(ks, device=smallest.device)).float()
    low, high = bootstrap_interval(has_flipped, level, resamples, seed)
    return BrittlenessResult(smallest, has_flipped.mean(0), Interval(low.clamp(0, 1), high.clamp(0, 1)))


def brittleness(
    predictions: Tensor,
    reference: Tensor,
    ks: Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> BrittlenessResult:
    """The smallest number of proponents whose removal flips a prediction (Ilyas et al. 2022, "data support").

    Args:
        predictions: (n_test, n_k) or (n_test, n_seeds, n_k) int, the class that a model predicts which was trained
            without the k strongest proponents. With several seeds more than half of them must differ.
        reference: (n_test,) int, what a prediction must differ from: **the whole model's prediction**, or the label, as
            dattri compares it. Against the label, a test example that the whole model gets wrong has flipped with
            nothing removed: put 0 among ``ks``, else it counts as flipped by the first of them.
        ks: numbers of removed examples, growing; 0 stands for the whole model.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        TypeError: a tensor is not of integers.
        ValueError: shapes do not go together, or ``ks`` do not grow.

    Example:
        >>> predictions = torch.tensor([[0, 0, 1], [2, 1, 1], [1, 1, 1], [0, 0, 0]])
        >>> result = brittleness(predictions, torch.tensor([0, 2, 2, 0]), ks=(0, 20, 40))
        >>> result.smallest, result.share
        (tensor([40., 20.,  0., inf]), tensor([0.2500, 0.5000, 0.7500]))
    """
    ks = growing_ks(ks, least=0)
    return _brittleness_compute(_brittleness_update(predictions, reference, ks), ks, level, resamples, seed)
