"""From a review of labels to the table that people read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_tracin.gradients.sites import last_site
from lightning_tracin.report.explanation import Example
from lightning_tracin.report.label_issues import LabelIssue, LabelIssues
from lightning_tracin.results.reader import Reader
from lightning_tracin.scoring.label_review import LabelReview
from lightning_tracin.scoring.methods import Method, TracInLast
from lightning_tracin.scoring.naming import described, is_constant_on_itself, without_normalizing
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.storage.checkpoint import Checkpoint


def review_method(checkpoints: Sequence[Checkpoint], method: Method) -> Method:
    """What measures the self-influence of a result's training examples where nothing else is asked for.

    It is TracIn-Last, which finds mislabelled examples best, where its gradients are stored; else the result's own
    method, without the norms of a cosine, which is 1 for any example with itself, and without a ridge.
    """
    site = last_site(checkpoints[0].sites)
    if site is not None and all(each.has_gradients(site) for each in checkpoints):
        return TracInLast()
    is_costly = isinstance(method, TracInRidge)  # another kernel
    return without_normalizing(method) if is_costly or is_constant_on_itself(method) else method


def label_issues_of(
    review: LabelReview,
    method: Method,
    reader: Reader,
    examples: Callable[[Sequence[int]], Mapping[int, Example]],
    n: int | None,
) -> LabelIssues:
    """The table of a review.

    Args:
        review: of the labels.
        method: measured self-influence.
        reader: what to print for labels.
        examples: what training examples say, by index.
        n: how many to list, those of highest self-influence; None for all.
    """
    order = review.order[:n]
    known = examples(order.tolist())
    ranks = review.ranks_in_class().tolist()
    issues = [
        LabelIssue(
            example=_with_label(known[index], reader.label(_known(review.given, index))),
            is_label_issue=None if review.predicted[index].isnan() else bool(review.is_issue[index]),
            label_score=_known(review.scores, index),
            predicted_label=reader.label(_known(review.predicted, index)),
            self_influence=float(review.self_influence[index]),
            rank=place + 1,
            rank_in_class=ranks[place] or None,
        )
        for place, index in enumerate(order.tolist())
    ]
    n_issues = int(review.is_issue.sum()) if review.knows_predictions else None
    return LabelIssues(issues, len(review.order), n_issues, described(method), review.agreement)


def _with_label(example: Example, label: str | None) -> Example:
    """An example with the label that the review has of it; it keeps its own where that is a set, not a number."""
    return example if label is None else replace(example, label=label)


def _known(values: Tensor, index: int) -> float | None:
    return None if bool(torch.isnan(values[index])) else float(values[index])
