"""The truth that scores of whole training sets are held to: networks fitted to random halves, over seeds.

What they say is committed with the tables, a file for each task and seed: another method is held to the same networks
without a fit, and a further seed adds to them. A file that is removed is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
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


def halves_of(task: Task, folder: Path, kept: Path, n: int = 100, seeds: Sequence[int] = (0, 1)) -> Halves:
    """What networks say that are fitted to random halves; fits what is not known yet.

    Args:
        task: what is fitted.
        folder: of all retrainings of the study; a task has a folder there.
        kept: folder of the files that hold what is known.
        n: number of halves.
        seeds: with each of which a network is fitted to each half.

    Raises:
        SystemExit: if a file is of other examples, or of other halves.
    """
    subsets = random_halves(len(task.train), n)
    outputs = [_said(task, folder, kept / f"{task.name}-{seed}.safetensors", subsets, seed) for seed in seeds]
    return Halves(subsets, torch.stack(outputs, 1))


def _said(task: Task, folder: Path, path: Path, subsets: Tensor, seed: int) -> Tensor:
    """Log-probabilities of the test examples' labels by networks of one seed, (m, n_test)."""
    known = _read(path, task, subsets)
    if len(known) < len(subsets):
        found = retrainings(task, folder / task.name / "halves").run(subsets[len(known) :], [seed])
        known = torch.cat([known, -found.losses[:, 0]])
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"outputs": known, "subsets": _packed(subsets[: len(known)])}
        save_file(tensors, path, {"task": task.name, "seed": str(seed), "examples": task.fingerprint()})
    return known[: len(subsets)]


def _read(path: Path, task: Task, subsets: Tensor) -> Tensor:
    """What a file holds, (m, n_test); of none, no rows."""
    if not path.exists():
        return torch.empty(0, len(task.test))
    with safe_open(path, "pt") as opened:
        examples, known = opened.metadata()["examples"], opened.get_tensor("subsets")
        outputs: Tensor = opened.get_tensor("outputs")
    shared = min(len(known), len(subsets))
    if examples != task.fingerprint() or not torch.equal(known[:shared], _packed(subsets[:shared])):
        raise SystemExit(f"{path} is of other examples or halves than {task.title} has here: remove it to fit anew.")
    return outputs


def _packed(subsets: Tensor) -> Tensor:
    """Masks (m, n) as bits, (m, n / 8) uint8."""
    return torch.from_numpy(np.packbits(subsets.numpy(), axis=1))


def retrainings(task: Task, folder: Path) -> Retrainings:
    """The retrainings of a task that a folder keeps."""
    return Retrainings(folder, task.rebuild, task.test_loader(), n_train=len(task.train), trainer=task.trainer)
