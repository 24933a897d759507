"""The linear datamodelling score of many methods on one task, with its ceiling, and within classes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.halves import Halves
from benchmarks.evidence.task import Task
from lightning_tracin.metrics.functional import linear_datamodeling_difference, linear_datamodeling_score


def lds_table(
    task: Task,
    halves: Halves,
    scores: Mapping[str, Tensor],
    baselines: Collection[str],
    former: Mapping[str, Any] = MappingProxyType({}),
    classes: Tensor | None = None,
) -> dict[str, Any]:
    """All methods' scores, the best first, as one table of JSON.

    Args:
        task: whose.
        halves: what retrained networks say.
        scores: by method, (n_test, n_train).
        baselines: names of methods that need no trace; the others are compared in pairs with the best of them.
        former: a table of the same halves, seeds and best baseline, whose other methods stay.
        classes: of the training examples, (n_train,); their labels by default.
    """
    labels = task.train.labels if classes is None else classes
    found = {name: linear_datamodeling_score(each, *halves) for name, each in scores.items()}
    with warnings.catch_warnings():  # within classes labels alone say nothing: their score is 0, and that is no fault
        warnings.filterwarnings("ignore", message="Argument `scores` expected to vary")
        within = {name: linear_datamodeling_score(each, *halves, within=labels) for name, each in scores.items()}
    reference = max((name for name in found if name in baselines), key=lambda each: float(found[each].mean))
    rows = []
    for name in found:
        difference, error = linear_datamodeling_difference(found[name], found[reference])
        above = {"above_reference": _rounded(difference), "above_reference_se": _rounded(error)}
        whole = _entry(found[name], "") | {"one_seed_lds": _rounded(_against_one_seed(scores[name], halves))}
        rows.append({"method": name, **whole, **_entry(within[name], "within_"), **above})
    first, first_within = next(iter(found.values())), next(iter(within.values()))
    m, seeds, n_test = halves.outputs.shape
    if [former.get(each) for each in ("halves", "seeds", "reference")] == [m, seeds, reference]:
        rows += [row for row in former["rows"] if row["method"] not in found]
    return {
        "task": task.name,
        "title": task.title,
        "halves": m,
        "seeds": seeds,
        "n_train": len(task.train),
        "n_test": n_test,
        "reliability": _rounded(first.reliability),
        "ceiling": _rounded(first.ceiling),
        "within_reliability": _rounded(first_within.reliability),
        "within_ceiling": _rounded(first_within.ceiling),
        "reference": reference,
        "rows": sorted(rows, key=lambda row: -row["lds"]),
    }


def _against_one_seed(scores: Tensor, halves: Halves) -> Tensor:
    """The score against networks of one seed, the mean over seeds: what studies with one seed report."""
    found = [linear_datamodeling_score(scores, halves.subsets, each).mean for each in halves.outputs.unbind(1)]
    return torch.stack(found).mean()


def _entry(result: Any, prefix: str) -> dict[str, float | None]:
    return {
        f"{prefix}lds": _rounded(result.mean),
        f"{prefix}se_subsets": _rounded(result.se_subsets),
        f"{prefix}se_tests": _rounded(result.se_tests),
    }


def _rounded(value: Tensor | None) -> float | None:
    return None if value is None else round(float(value), 4)
