"""The truth that scores of whole training sets are held to: networks fitted to random halves, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.evidence.task import Task
from lightning_tracin.retraining import Retrainings, random_halves


class Halves(NamedTuple):
    """What networks that were fitted to halves say.

    Attributes:
        subsets: (m, n_train) bool, which examples each was fitted to.
        outputs: (m, seeds, n_test) log-probability of each test example's label.
    """

    subsets: Tensor
    outputs: Tensor


def retrained(task: Task, folder: Path, n: int = 100, seeds: Sequence[int] = (0, 1)) -> Halves:
    """Fit to random halves, as far as that has not been done.

    Args:
        task: what is fitted.
        folder: of all retrainings of the study; a task has a folder there.
        n: number of halves.
        seeds: with each of which a network is fitted to each half.
    """
    halves = random_halves(len(task.train), n)
    found = retrainings(task, folder / task.name / "halves").run(halves, seeds)
    return Halves(found.subsets, -found.losses)


def retrainings(task: Task, folder: Path) -> Retrainings:
    """The retrainings of a task that a folder keeps."""
    return Retrainings(folder, task.build, task.test_loader(), n_train=len(task.train), trainer=task.trainer)
