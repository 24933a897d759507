"""Scores of a fitted task by many methods, each computed once and kept in the study's folder."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.task import Task


def kept_scores(folder: Path, name: str, scorer: Callable[[Fitted], Tensor], fitted: Fitted) -> Tensor:
    """Scores of a method, (n_test, n_train) float32.

    Args:
        folder: of the whole study.
        name: of the method.
        scorer: computes them where they are not there yet.
        fitted: the fit of a task.
    """
    path = folder / fitted.task.name / "scores" / f"{slug(name)}.safetensors"
    if not path.exists():
        started = time.monotonic()
        scores = scorer(fitted).float().contiguous().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"scores": scores}, path, {"method": name, "seconds": f"{time.monotonic() - started:.1f}"})
    return load_file(path)["scores"]


def all_kept_scores(folder: Path, task: Task) -> dict[str, Tensor]:
    """The scores of all methods that are kept of a task, by name.

    Args:
        folder: of the whole study.
        task: whose.
    """
    found = {}
    for path in sorted((folder / task.name / "scores").glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found[opened.metadata()["method"]] = opened.get_tensor("scores")
    return found


def slug(name: str) -> str:
    """A name as one of a file.

    Example:
        >>> slug("WE cosine, sqrt(w)")
        'we-cosine-sqrt-w'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
