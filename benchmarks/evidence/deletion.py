"""Case deletion: without a test example's strongest proponents, what does a network say of it that is fitted again?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.fitting import topk
from benchmarks.evidence.halves import retrainings
from benchmarks.evidence.task import Task
from lightning_tracin.metrics.functional import deletion_curve
from lightning_tracin.retraining import Retrainings, without

SAME_LABEL = "random, same label"


@dataclass(frozen=True, eq=False)
class Change:
    """What removing proponents changes in a network's answers, the mean over seeds.

    Attributes:
        method: by which proponents were found.
        k: how many were removed.
        seeds: of the fits.
        p: the change of the probability of each test example's label, (n_tests,).
    """

    method: str
    k: int
    seeds: tuple[int, ...]
    p: Tensor

    def and_also(self, other: Change) -> Change:
        """The same with the seeds of another."""
        seeds = (*self.seeds, *other.seeds)
        share = len(other.seeds) / len(seeds)
        return replace(self, seeds=seeds, p=torch.lerp(self.p, other.p, share))


class Deletion:
    """Retrains without the proponents that methods name, as far as that has not been done.

    Args:
        task: whose.
        folder: of the whole study.
        tests: places of the test examples.
    """

    def __init__(self, task: Task, folder: Path, tests: Sequence[int]) -> None:
        self.task = task
        self.tests = list(tests)
        self._retrainings: Retrainings = retrainings(task, folder / task.name / "deletion")
        self._all = without(len(task.train), [])

    def said(self, kept: Tensor, seeds: Sequence[int]) -> Tensor:
        """Log-probability of the label of each test example, (n_kept, seeds, n_test), of networks fitted to subsets.

        Args:
            kept: (n_kept, n_train) bool.
            seeds: of the fits.
        """
        return -self._retrainings.run(kept, seeds).losses

    def without_proponents(self, scores: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
        """Log-probability of each test example's label without its own k proponents, (n_tests, seeds)."""
        n_train = len(self.task.train)
        removed = topk(scores[self.tests], k)
        kept = torch.stack([without(n_train, each) for each in removed])
        return self.said(kept, seeds)[range(len(self.tests)), :, self.tests]

    def without_same_label(self, k: int, seeds: Sequence[int]) -> Tensor:
        """The same without k random training examples of its label, (n_tests, seeds).

        Test examples of one label share the examples that are removed, which are others with each seed.
        """
        labels = self.task.test.labels[self.tests]
        columns = []
        for seed in seeds:
            kept = {int(label): self._without_some(int(label), k, seed) for label in torch.unique(labels)}
            said = self.said(torch.stack(list(kept.values())), [seed])[:, 0]
            rows = [list(kept).index(int(label)) for label in labels]
            columns.append(said[rows, self.tests])
        return torch.stack(columns, 1)

    def with_all(self, seeds: Sequence[int]) -> Tensor:
        """The same with nothing removed, (n_tests, seeds)."""
        return self.said(self._all[None], seeds)[0][:, self.tests].T

    def _without_some(self, label: int, k: int, seed: int) -> Tensor:
        same = (self.task.train.labels == label).nonzero()[:, 0]
        drawn = torch.randperm(len(same), generator=torch.Generator().manual_seed(seed))[:k]
        return without(len(self.task.train), same[drawn])


def with_seed(
    changes: Sequence[Change], deletion: Deletion, scores: Mapping[str, Tensor], ks: Sequence[int], seed: int
) -> list[Change]:
    """What removing changes, with one more seed in the means of those that do not have it yet.

    Args:
        changes: what is known.
        deletion: of a task.
        scores: by method, (n_test, n_train).
        ks: how many proponents are removed.
        seed: of the fits.
    """
    known = {(each.method, each.k): each for each in changes}
    with_all = deletion.with_all([seed]).exp()
    for k in ks:
        for method in (SAME_LABEL, *scores):
            before = known.get((method, k))
            if before is not None and seed in before.seeds:
                continue
            said = (
                deletion.without_same_label(k, [seed])
                if method == SAME_LABEL
                else deletion.without_proponents(scores[method], k, [seed])
            )
            alone = Change(method, k, (seed,), (said.exp() - with_all)[:, 0])
            known[method, k] = alone if before is None else before.and_also(alone)
    return list(known.values())


def deletion_table(
    deletion: Deletion, changes: Sequence[Change], former: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What removing changes, as one table of JSON: a row for each method and number of removed examples.

    Args:
        deletion: of a task.
        changes: all that is known.
        former: a table of before, whose rows stay where nothing was added: its numbers are rounded, so that of two that
            print alike nobody knows any more which is lower.
    """
    seeds = sorted({seed for each in changes for seed in each.seeds})
    return {
        "task": deletion.task.name,
        "title": deletion.task.title,
        "tests": deletion.tests,
        "probability_with_all": round(float(deletion.with_all(seeds).exp().mean()), 4),
        "rows": [row for k in sorted({each.k for each in changes}) for row in _rows(changes, k, former or {})],
    }


def _rows(changes: Sequence[Change], k: int, former: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a number of removed examples."""
    own = [each for each in changes if each.k == k]
    known = [row for row in former.get("rows", []) if row["k"] == k]
    if [(row["method"], tuple(row["seeds"])) for row in known] == [(each.method, each.seeds) for each in own]:
        return known
    return [
        {
            "method": each.method,
            "k": k,
            "seeds": list(each.seeds),
            "p": _mean_and_interval(each.p),
            "against": {other.method: _pair(each, other) for other in own if other.method != each.method},
            "per_test": _numbers(each.p),
        }
        for each in own
    ]


def changes_of(table: Mapping[str, Any]) -> list[Change]:
    """The changes that a table is of."""
    return [
        Change(row["method"], row["k"], tuple(row["seeds"]), torch.tensor(row["per_test"])) for row in table["rows"]
    ]


def _pair(one: Change, other: Change) -> dict[str, Any]:
    return {"p": _mean_and_interval(one.p - other.p), "lower": int((one.p < other.p).sum())}


def _mean_and_interval(per_test: Tensor) -> list[float]:
    """The mean over test examples, and its 95 % interval by the bootstrap over them."""
    result = deletion_curve(per_test[:, None, None], [1])
    return _numbers(torch.cat([result.curve, *result.curve_interval]))


def _numbers(values: Tensor) -> list[float]:
    return [round(float(each), 4) for each in values]
