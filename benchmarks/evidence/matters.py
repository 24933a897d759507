"""Do the proponents of a prediction matter? ``does_it_matter`` on a task of the study, as a user would ask it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.fitting import Fitted
from lightning_tracin.retraining import does_it_matter


def matters_table(fit: Fitted, folder: Path, tests: Sequence[int], k: int, seeds: int) -> dict[str, Any]:
    """What comes of leaving out the k proponents of test examples, by plain TracIn-WE.

    Args:
        fit: of a task.
        folder: of the whole study; fits that the case deletion has run are not run again.
        tests: places of the test examples.
        k: how many proponents.
        seeds: how many, two at least.
    """
    task = fit.task
    result = fit.trainer.influence(
        task.test_loader(), fit.module, train_dataloaders=fit.train_loader(), trace=fit.trace.path
    )
    effect = does_it_matter(
        result,
        task.rebuild,
        task.test_loader(),
        k,
        seeds,
        test_indices=tests,
        against=["random"],
        trainer=task.trainer,
        folder=folder / task.name / "deletion",
    )
    beaten = effect.beats("random")
    return {
        "k": k,
        "seeds": seeds,
        "summary": effect.summary(),
        "sentences": [effect.sentence(row) for row in range(len(tests))],
        "beats_random": beaten.tolist(),
        "n_beating_random": int(beaten.sum()),
    }
