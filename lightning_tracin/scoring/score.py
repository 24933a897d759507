"""Test gradients against stored ones, shard by shard: no more than one shard is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.parallel.processes import Processes
from lightning_tracin.scoring.strongest import TopK, merge_top, top_of
from lightning_tracin.scoring.terms import Term


@dataclass(frozen=True)
class Scores:
    """The scores of some test examples.

    Attributes:
        totals: (n_test, 2) float64, the sums of each test example's positive and of its negative scores.
        scores: (n_test, n_train) float32, or None if only the strongest were kept.
        proponents: the strongest, if no more were kept.
        opponents: the strongest, if no more were kept.
    """

    totals: Tensor
    scores: Tensor | None = None
    proponents: TopK | None = None
    opponents: TopK | None = None


@dataclass(frozen=True)
class PreparedTests:
    """The test side of a query.

    Attributes:
        indices: (n_test,) of the examples in their data set.
        terms: what is added up to scores.
        gradients: of the test examples, prepared for each of the terms.
    """

    indices: Tensor
    terms: Sequence[Term]
    gradients: Sequence[Any]


def score(tests: PreparedTests, k: int | None, processes: Processes, device: torch.device) -> Scores:
    """Score all training examples on some test examples.

    Each process scores its share of the shards, and all have the result.

    Args:
        tests: the test examples.
        k: keep only the k strongest proponents and opponents of each test example.
        processes: those that each score their share.
        device: what multiplies.

    Raises:
        ValueError: if scores are not finite.
    """
    n_test = len(tests.indices)
    stored = [term.shards for term in tests.terms]
    on_device = [gradients.to(device) for gradients in tests.gradients]
    columns: list[Tensor] = [torch.zeros(n_test, 0)]
    strongest: list[tuple[TopK, TopK]] = []
    totals = torch.zeros(n_test, 2, dtype=torch.float64)
    for shard in processes.share(len(stored[0])):
        start, stop = stored[0].bounds(shard)
        scores = torch.zeros(n_test, stop - start, dtype=torch.float32, device=device)
        for term, gradients, shards in zip(tests.terms, on_device, stored, strict=True):
            block = term.prepared_training(shards.read(shard))
            scores += term.weight * term.method.dot(gradients, block, term.moments)
        totals += torch.stack([scores.clamp(min=0).sum(1), scores.clamp(max=0).sum(1)], 1).cpu()
        if not torch.isfinite(totals).all():
            example = int(tests.indices[~torch.isfinite(totals).all(1)][0])
            raise ValueError(
                f"Scores of test example {example} are too large for float32: the products of its gradients with those "
                'of training examples overflow. Use a method with normalize="cosine", or look at the learning rate.'
            )
        if k is None:
            columns.append(scores.cpu())
        else:
            strongest = [merge_top([*strongest, top_of(scores, start, k)], k)]
    totals = torch.stack(processes.gather(totals)).sum(0)
    if k is None:
        return Scores(totals, torch.cat(processes.gather(torch.cat(columns, dim=1)), dim=1))
    parts = [part for of_process in processes.gather(strongest) for part in of_process]
    return Scores(totals, None, *merge_top(parts, k))


def joined_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several blocks of test examples, one after the other."""
    if len(parts) == 1:
        return parts[0]
    totals = torch.cat([part.totals for part in parts])
    matrices = [part.scores for part in parts if part.scores is not None]
    if matrices:
        return Scores(totals, torch.cat(matrices))
    proponents, opponents = (
        TopK(torch.cat([top.values for top in side]), torch.cat([top.indices for top in side]))
        for side in (
            [part.proponents for part in parts if part.proponents is not None],
            [part.opponents for part in parts if part.opponents is not None],
        )
    )
    return Scores(totals, None, proponents, opponents)
