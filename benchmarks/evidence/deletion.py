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
    changes = {name: torch.stack([here.exp() - before.exp() for here in each], 2) for name, each in after.items()}
    logs = {name: torch.stack([here - before for here in each], 2) for name, each in after.items()}
    rows = [
        {
            "method": name,
            **_summary("p", each, ks),
            **_summary("log_p", logs[name], ks),
            "per_test": [_numbers(column) for column in each.mean(1).T],
            "against": {
                other: _summary("p", each - its, ks) | {"lower": _numbers((each.mean(1) < its.mean(1)).sum(0))}
                for other, its in changes.items()
                if other != name
            },
        }
        for name, each in changes.items()
    ]
    return {
        "task": deletion.task.name,
        "title": deletion.task.title,
        "tests": deletion.tests,
        "seeds": list(seeds),
        "ks": list(ks),
        "probability_with_all": round(float(before.exp().mean()), 4),
        "rows": rows,
    }


def _summary(name: str, changes: Tensor, ks: Sequence[int]) -> dict[str, list[float]]:
    """Means over test examples and seeds of changes (n_tests, seeds, n_k), and intervals over test examples."""
    result = deletion_curve(changes, ks)
    low, high = result.curve_interval
    return {name: _numbers(result.curve), f"{name}_low": _numbers(low), f"{name}_high": _numbers(high)}


def _numbers(values: Tensor) -> list[float]:
    return [round(float(each), 4) for each in values]
