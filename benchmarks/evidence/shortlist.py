"""A shortlist of training examples before influence is computed (FastIF, Guo et al. 2021, arXiv 2012.15781)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.evidence.task import Task

LENGTHS = (50, 100, 200)
TOP = 10  # proponents that are looked for


def shortlist_recall(scores: Tensor, nearness: Tensor, lengths: Sequence[int], top: int = TOP) -> list[float]:
    """The share of the strongest proponents that a shortlist of the nearest training examples holds.

    Args:
        scores: (n_test, n_train) influence.
        nearness: (n_test, n_train) similarity, by which the shortlist is made.
        lengths: how many examples it holds.
        top: how many proponents are looked for.

    Returns:
        For each length the mean over test examples.

    Example:
        >>> from torch import tensor
        >>> shortlist_recall(tensor([[4.0, 3.0, 2.0, 1.0]]), tensor([[0.9, 0.1, 0.8, 0.2]]), (1, 2, 4), top=2)
        [0.5, 0.5, 1.0]
    """
    places = nearness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    found = places.gather(1, scores.topk(top, 1).indices)
    return [float((found < length).float().mean()) for length in lengths]


def shortlist_table(task: Task, scores: Mapping[str, Tensor], nearness: Mapping[str, Tensor]) -> dict[str, Any]:
    """What shortlists lose of each method's strongest proponents, as one table of JSON.

    Args:
        task: whose.
        scores: by method, (n_test, n_train).
        nearness: by what a shortlist is made, (n_test, n_train).
    """
    rows = [
        {
            "method": method,
            "nearest_by": by,
            "recall": dict(zip(LENGTHS, (round(each, 4) for each in shortlist_recall(of, near, LENGTHS)), strict=True)),
        }
        for method, of in scores.items()
        for by, near in nearness.items()
    ]
    return {"task": task.name, "title": task.title, "n_train": len(task.train), "top": TOP, "rows": rows}
