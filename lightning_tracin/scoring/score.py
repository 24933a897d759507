"""Scores from stored gradients, shard by shard: of test examples, and of training examples on themselves.

No more than one shard is in memory at a time. Each process scores its share of the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.strongest import TopK, merge_top, top_of
from lightning_tracin.scoring.terms import Term, terms_at
from lightning_tracin.storage.checkpoint import Checkpoint, ever_drawn


@dataclass(frozen=True)
class Scores:
    """The scores of training examples on some test examples.

    Attributes:
        totals: (n_test, 2) float64, the sum of each test example's positive scores and that of its negative scores.
        scores: (n_test, n_train) float32; None if only the strongest were kept.
        proponents: the training examples of largest score; None if all scores were kept.
        opponents: the training examples of smallest score; None if all scores were kept.
    """

    totals: Tensor
    scores: Tensor | None = None
    proponents: TopK | None = None
    opponents: TopK | None = None


@dataclass(frozen=True)
class PreparedTests:
    """A query's test examples, prepared for multiplication.

    Attributes:
        indices: (n_test,) their indices in their data set.
        terms: the terms that add up to a score, one for each checkpoint and summand.
        gradients: for each term, the prepared gradients of all test examples.
    """

    indices: Tensor
    terms: Sequence[Term]
    gradients: Sequence[Any]


def score(tests: PreparedTests, k: int | None, processes: Processes, device: torch.device) -> Scores:
    """Score all training examples on some test examples; every process returns the scores of all.

    Args:
        tests: the test examples.
        k: keep only the k strongest proponents and opponents of each test example, of those that training drew; None
            keeps all scores.
        processes: the processes that share the shards; every one of them must call it.
        device: the device that multiplies.

    Raises:
        ValueError: if scores overflow, or a file of the trace is damaged.
    """
    n_test = len(tests.indices)
    shards_by_term = [term.shards for term in tests.terms]
    on_device = [gradients.to(device) for gradients in tests.gradients]
    columns: list[Tensor] = [torch.zeros(n_test, 0)]
    strongest: list[tuple[TopK, TopK]] = []
    totals = torch.zeros(n_test, 2, dtype=torch.float64)
    drawn = ever_drawn([term.checkpoint for term in tests.terms])
    for shard in processes.share(len(shards_by_term[0])):
        start, stop = shards_by_term[0].bounds(shard)
        scores = torch.zeros(n_test, stop - start, dtype=torch.float32, device=device)
        for term, gradients, shards in zip(tests.terms, on_device, shards_by_term, strict=True):
            if not shards.holds(shard):
                continue
            block = term.prepared_training(shards.read(shard))
            scores += term.dot(gradients, block)
        totals += torch.stack([scores.clamp(min=0).sum(1), scores.clamp(max=0).sum(1)], 1).cpu()
        bad = tests.indices[~torch.isfinite(totals).all(1)]
        require_finite_scores(totals, f"test example {int(bad[0]) if len(bad) else ''}")
        if k is None:
            columns.append(scores.cpu())
        else:
            examples = torch.arange(start, stop)
            if drawn is not None:
                examples = examples[drawn[start:stop]]
                scores = scores[:, (examples - start).to(device)]
            if len(examples):
                strongest = [merge_top([*strongest, top_of(scores, examples, k)], k)]
    totals = torch.stack(processes.gather(totals)).sum(0)
    if k is None:
        return Scores(totals, torch.cat(processes.gather(torch.cat(columns, dim=1)), dim=1))
    candidates = [pair for pairs in processes.gather(strongest) for pair in pairs]
    return Scores(totals, None, *merge_top(candidates, k))


def joined_scores(blocks: Sequence[Scores]) -> Scores:
    """The scores of several blocks of test examples, concatenated."""
    if len(blocks) == 1:
        return blocks[0]
    totals = torch.cat([block.totals for block in blocks])
    matrices = [block.scores for block in blocks if block.scores is not None]
    if matrices:
        return Scores(totals, torch.cat(matrices))
    proponents, opponents = (
        TopK(torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops]))
        for tops in (
            [block.proponents for block in blocks if block.proponents is not None],
            [block.opponents for block in blocks if block.opponents is not None],
        )
    )
    return Scores(totals, None, proponents, opponents)


def self_influences(checkpoints: Sequence[Checkpoint], method: Method, processes: Processes = ALONE) -> Tensor:
    """Every training example's influence on itself.

    Args:
        checkpoints: checkpoints that have the method's gradients, at least one.
        method: the method that scores.
        processes: the processes that share the shards; every one of them must call it.

    Returns:
        (n_train,) float32.

    Raises:
        ValueError: if the fit did not record what the method needs, or a file of the trace is damaged.
    """
    terms = [term for checkpoint in checkpoints for term in terms_at(checkpoint, method)]
    shards_by_term = [term.shards for term in terms]
    columns = [torch.zeros(0)]
    for shard in processes.share(len(shards_by_term[0])):
        start, stop = shards_by_term[0].bounds(shard)
        scores = torch.zeros(stop - start, dtype=torch.float32)
        for term, shards in zip(terms, shards_by_term, strict=True):
            if not shards.holds(shard):
                continue
            block = shards.read(shard)
            norms = [
                term.method.norms(term.prepared(block, "test"), term.preconditioner),
                term.method.norms(term.prepared(block, "train"), term.preconditioner),
            ]
            # Both sides are multiples of one gradient, so their product is that of their norms.
            scores += term.weight * norms[0] * norms[1]
        require_finite_scores(scores, f"training examples {start} to {stop - 1} on themselves")
        columns.append(scores)
    return torch.cat(processes.gather(torch.cat(columns)))


def require_finite_scores(scores: Tensor, whose: str) -> None:
    """Check that scores are not too large.

    Raises:
        ValueError: if one is infinite or NaN.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"Scores of {whose} are too large for float32: the products of gradients overflow. Use a method with "
            'normalize="cosine", or look at the learning rate.'
        )
