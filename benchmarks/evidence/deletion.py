"""Case deletion: without a test example's strongest proponents, what does a network say of it that is fitted again?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def run_deletion(deletion: Deletion, scores: Mapping[str, Tensor], ks: Sequence[int], seeds: Sequence[int]) -> None:
    """Retrain seed by seed, so that a run that is broken off has all methods with fewer seeds.

    Args:
        deletion: of a task.
        scores: by method, (n_test, n_train).
        ks: how many proponents are removed.
        seeds: of the fits.
    """
    for seed in seeds:
        deletion.with_all([seed])
        for k in ks:
            deletion.without_same_label(k, [seed])
            for each in scores.values():
                deletion.without_proponents(each, k, [seed])


def deletion_table(
    deletion: Deletion, scores: Mapping[str, Tensor], ks: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    """What removing changes, by method, as one table of JSON; retrains what is missing."""
    before = deletion.with_all(seeds)
    after = {SAME_LABEL: [deletion.without_same_label(k, seeds) for k in ks]}
    for name, each in scores.items():
        after[name] = [deletion.without_proponents(each, k, seeds) for k in ks]
    rows = [{"method": name, **_changes(before, each, ks)} for name, each in after.items()]
    for row in rows:
        row["lower_than"] = {
            other["method"]: [
                sum(mine < its for mine, its in zip(*pair, strict=True))
                for pair in zip(row["per_test"], other["per_test"], strict=True)
            ]
            for other in rows
            if other is not row
        }
    return {
        "task": deletion.task.name,
        "title": deletion.task.title,
        "tests": deletion.tests,
        "seeds": list(seeds),
        "ks": list(ks),
        "probability_with_all": round(float(before.exp().mean()), 4),
        "rows": rows,
    }


def _changes(before: Tensor, after: Sequence[Tensor], ks: Sequence[int]) -> dict[str, Any]:
    """Means over test examples and seeds, and intervals over test examples, at each k."""
    probabilities = torch.stack([each.exp() - before.exp() for each in after], dim=2)
    logs = torch.stack([each - before for each in after], dim=2)
    p, log_p = deletion_curve(probabilities, ks), deletion_curve(logs, ks)
    return {
        "p": _numbers(p.curve),
        "p_low": _numbers(p.curve_interval.low),
        "p_high": _numbers(p.curve_interval.high),
        "log_p": _numbers(log_p.curve),
        "log_p_low": _numbers(log_p.curve_interval.low),
        "log_p_high": _numbers(log_p.curve_interval.high),
        "per_test": [_numbers(column) for column in probabilities.mean(1).T],
    }


def _numbers(values: Tensor) -> list[float]:
    return [round(float(each), 4) for each in values]
