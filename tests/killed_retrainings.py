"""Retrainings whose process is killed by SIGKILL, in a fit or before an operation on files, and gone on with.

A process of its own, with one thread, as it forks. It prints, in JSON, what was found after each kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from retraining_toys import N_TRAIN, Build, retrainings
from torture.children import Aim, in_child
from toy import Toy

from lightning_tracin.retraining import random_halves

SUBSETS = random_halves(N_TRAIN, 3)


class Killed(Toy):
    """Is killed in the midst of its fit."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class KilledInSecond(Build):
    """Its second fit is killed; the first two that it builds are only looked at."""

    def __call__(self, indices, seed):
        self.module = Killed if len(self.asked) == 3 else Toy
        return super().__call__(indices, seed)


def run(folder, subsets):
    """The losses, and how many fits there were beside the two looks at what is built."""
    build = Build()
    losses = retrainings(folder, build).run(subsets).losses
    return losses, len(build.asked) - 2


def after_kill(folder: Path, told: Path, act, subsets, expected, aim=None) -> dict[str, object]:
    """What a kill leaves, and what comes of going on."""
    killed = in_child(act, told, aim)
    left = Counter(path.suffix for path in folder.glob("*"))
    again = in_child(lambda: run(folder, subsets), told)
    assert again.error is None, again.error
    losses, n_fits = again.value
    return {
        "killed": killed.killed and not killed.hung,
        "left": left,
        "fits": n_fits,
        "same": torch.equal(losses, expected),
        "finally": Counter(path.suffix for path in folder.glob("*")),
    }


def in_fit(folder: Path, told: Path) -> list[dict[str, object]]:
    """A kill in the second of three fits."""
    expected, _ = in_child(lambda: run(folder / "whole", SUBSETS), told).value
    place = folder / "killed"
    act = lambda: retrainings(place, KilledInSecond()).run(SUBSETS) and None  # noqa: E731
    return [after_kill(place, told, act, SUBSETS, expected)]


def before_operations(folder: Path, told: Path) -> list[dict[str, object]]:
    """A kill before each operation on files of one retraining."""
    one, found = SUBSETS[:1], []
    whole = in_child(lambda: run(folder / "whole", one), told)
    for number in range(1, whole.operations + 1):
        act = lambda place=folder / str(number): run(place, one)  # noqa: E731
        found.append(after_kill(folder / str(number), told, act, one, whole.value[0], Aim(operation=number)))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kills = {"fit": in_fit, "files": before_operations}[sys.argv[1]]
    print(json.dumps(kills(Path(sys.argv[2]), Path(sys.argv[2]) / "told")))  # noqa: T201
