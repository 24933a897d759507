"""Scores from stored gradients, shard by shard: of test examples, and of training examples on themselves.

No more than one shard is in memory at a time. Each process scores its share of the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.scoring.methods import Method, TracInSum
from lightning_tracin.scoring.spread import Spread
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

    def of_part(self, number: int, n_parts: int) -> PreparedTests:
        """The terms of one part of a sum alone, each as its checkpoint counts, neither mixed nor divided."""
        own = slice(number, None, n_parts)
        return PreparedTests(self.indices, [replace(term, factor=1.0) for term in self.terms[own]], self.gradients[own])

    def counted_by(self, method: Method) -> PreparedTests:
        """The same, where each term counts as the method that it is of says by now."""
        factors = [summand.factor for summand in method.summands]
        terms = [replace(term, factor=factors[number % len(factors)]) for number, term in enumerate(self.terms)]
        return replace(self, terms=terms)


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
    columns: list[Tensor] = [torch.zeros(n_test, 0)]
    strongest: list[tuple[TopK, TopK]] = []
    totals = torch.zeros(n_test, 2, dtype=torch.float64)
    drawn = ever_drawn([term.checkpoint for term in tests.terms])
    for examples, scores in _by_shard(tests, processes, device):
        totals += torch.stack([scores.clamp(min=0).sum(1), scores.clamp(max=0).sum(1)], 1).cpu()
        bad = tests.indices[~torch.isfinite(totals).all(1)]
        require_finite_scores(totals, f"test example {int(bad[0]) if len(bad) else ''}")
        if k is None:
            columns.append(scores.cpu())
        else:
            counted, of_counted = _of_drawn(examples, scores, drawn)
            if len(counted):
                strongest = [merge_top([*strongest, top_of(of_counted, counted, k)], k)]
    totals = torch.stack(processes.gather(totals)).sum(0)
    if k is None:
        return Scores(totals, torch.cat(processes.gather(torch.cat(columns, dim=1)), dim=1))
    candidates = [pair for pairs in processes.gather(strongest) for pair in pairs]
    return Scores(totals, None, *merge_top(candidates, k))


def lacks_scales(method: Method) -> TypeGuard[TracInSum]:
    """Whether it is a sum whose parts' standard deviations are yet to be measured."""
    return isinstance(method, TracInSum) and method.scales is None


def with_scales(
    method: Method, blocks: Sequence[PreparedTests], processes: Processes, device: torch.device, *, strict: bool = True
) -> Method:
    """A sum with the standard deviations of its parts' scores on some test examples; other methods as they are.

    All pairs count but those with training examples that training never drew.

    Args:
        method: what the terms are of.
        blocks: the test examples.
        processes: those that share the shards; every one of them must call it.
        device: what multiplies.
        strict: refuse a part whose scores are all the same; else it is not divided.

    Raises:
        ValueError: if the scores of a part are all the same, or overflow, or if a file of the trace is damaged.
    """
    if not lacks_scales(method):
        return method
    n_parts = len(method.parts)
    spreads = [
        Spread.sum(_spread(tests.of_part(number, n_parts), processes, device) for tests in blocks)
        for number in range(n_parts)
    ]
    return _divided(method, spreads, strict=strict)


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

    A sum divides its parts by the standard deviations of these, where it has no scales; a part by which all examples
    have the same influence on themselves, as by a cosine, is not divided.

    Args:
        checkpoints: checkpoints that have the method's gradients, at least one.
        method: the method that scores.
        processes: the processes that share the shards; every one of them must call it.

    Returns:
        (n_train,) float32.

    Raises:
        ValueError: if the fit did not record what the method needs, or a file of the trace is damaged.
    """
    if lacks_scales(method):
        parts = [self_influences(checkpoints, part, processes) for part in method.parts]
        drawn = ever_drawn(checkpoints)
        scaled = _divided(method, [Spread.of(each if drawn is None else each[drawn]) for each in parts], strict=False)
        factors = torch.tensor([summand.factor for summand in scaled.summands])
        return (factors[:, None] * torch.stack(parts)).sum(0)
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


def _by_shard(tests: PreparedTests, processes: Processes, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The scores of this process's shards, one after the other.

    Yields:
        The indices of a shard's training examples, (n,) on the CPU, and their scores, (n_test, n) on the device.
    """
    shards_by_term = [term.shards for term in tests.terms]
    on_device = [gradients.to(device) for gradients in tests.gradients]
    for shard in processes.share(len(shards_by_term[0])):
        examples = torch.arange(*shards_by_term[0].bounds(shard))
        scores = torch.zeros(len(tests.indices), len(examples), dtype=torch.float32, device=device)
        for term, gradients, shards in zip(tests.terms, on_device, shards_by_term, strict=True):
            if shards.holds(shard):
                scores += term.dot(gradients, term.prepared_training(shards.read(shard)))
        yield examples, scores


def _of_drawn(examples: Tensor, scores: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Those of some training examples that training drew, and their columns of the scores; all if ``drawn`` is None."""
    if drawn is None:
        return examples, scores
    columns = torch.nonzero(drawn[examples])[:, 0]
    return examples[columns], scores[:, columns.to(scores.device)]


def _spread(tests: PreparedTests, processes: Processes, device: torch.device) -> Spread:
    """How far the scores of all pairs lie apart; every process must call it, and gets the same."""
    drawn = ever_drawn([term.checkpoint for term in tests.terms])
    own = [Spread.of(_of_drawn(*shard, drawn)[1]) for shard in _by_shard(tests, processes, device)]
    return Spread.sum(processes.gather(Spread.sum(own)))


def _divided(method: TracInSum, spreads: Sequence[Spread], *, strict: bool) -> TracInSum:
    """A sum with the deviations of its parts.

    Raises:
        ValueError: if those of a part are not finite, or, with ``strict``, if one is 0.
    """
    for part, spread in zip(method.parts, spreads, strict=True):
        require_finite_scores(torch.tensor([spread.squares]), f"{part}")
        if strict and spread.deviation == 0:
            raise ValueError(
                f"The scores of {part} are {spread.high:.3g} for all {spread.n} pairs of a test and a training "
                "example, so that the sum cannot divide them by their standard deviation. Leave that part out, or say "
                "what to divide by: TracInSum(..., scales=...). All are 0 where checkpoints count by a learning rate "
                "of 0, as of a layer that training never moved."
            )
    return replace(method, scales=[spread.deviation or 1.0 for spread in spreads])
