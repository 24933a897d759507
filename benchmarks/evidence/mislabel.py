"""Mislabelled training examples: does self-influence find labels that were flipped, or that people disagreed on?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.evidence.examples import Rows, trimmed
from benchmarks.evidence.fitting import Fitted, fitted
from benchmarks.evidence.task import Task
from benchmarks.evidence.texts import NOISY_SPREAD, review_spread
from lightning_tracin import TracInLast, TracInWE
from lightning_tracin.metrics.functional import mislabel_detection_auroc, mislabel_detection_curve

INSPECTED = [step / 20 for step in range(1, 21)]  # shares of the training set that a person looks at


def flipped(task: Task, share: float) -> tuple[Task, Tensor]:
    """The task with some training labels exchanged for another class, and which, (n_train,) bool.

    Args:
        task: with its own labels.
        share: of the labels that are flipped.
    """
    generator = torch.Generator().manual_seed(7)
    labels, n_classes = task.train.labels.clone(), len(task.label_names)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    steps = torch.randint(1, n_classes, (len(chosen),), generator=generator)
    labels[chosen] = (labels[chosen] + steps) % n_classes
    named = replace(task, name=f"{task.name}-flipped-{share:.0%}".replace("%", ""))
    return named.with_train_labels(labels), labels != task.train.labels


def disagreed(task: Task) -> Tensor:
    """Of movie reviews those whose ratings spread widely, (n_train,) bool: their labels are doubtful by nature."""
    spread = review_spread()
    return torch.tensor([spread[text] > NOISY_SPREAD for text in task.train.texts])


def suspicions(fit: Fitted) -> Mapping[str, Callable[[], Tensor]]:
    """What ranks training examples, the most suspicious highest, by name."""
    return {
        "self-influence, TracIn-WE": partial(fit.self_influence, TracInWE()),
        "self-influence, TracIn-Last": partial(fit.self_influence, TracInLast()),
        "self-influence, WE without special and common tokens": partial(
            fit.self_influence, TracInWE(exclude_tokens=("special", "common"))
        ),
        "loss, mean over checkpoints": partial(_mean_loss, fit),
    }


def mislabel_table(task: Task, folder: Path, wrong: Tensor, what: str) -> dict[str, Any]:
    """How well each ranking finds the wrong labels, as one table of JSON.

    Args:
        task: with the labels that are fitted to.
        folder: of the whole study.
        wrong: (n_train,) bool.
        what: is wrong, for people.
    """
    fit = fitted(task, folder)
    rows = []
    for name, rank in suspicions(fit).items():
        values = rank().float()
        curve = mislabel_detection_curve(values, wrong)
        found = [round(float(curve.found[round(share * len(wrong)) - 1]), 4) for share in INSPECTED]
        auroc = round(float(mislabel_detection_auroc(values, wrong)), 4)
        rows.append({"method": name, "auroc": auroc, "area": round(float(curve.area), 4), "found": found})
    return {
        "task": task.name,
        "title": task.title,
        "what": what,
        "n_train": len(wrong),
        "n_wrong": int(wrong.sum()),
        "accuracy": round(fit.accuracy(), 4),
        "inspected": INSPECTED,
        "rows": sorted(rows, key=lambda row: -row["auroc"]),
    }


def _mean_loss(fit: Fitted) -> Tensor:
    """What needs no gradient: the loss of each training example, the mean over checkpoints."""
    examples = fit.task.train
    kept = {name: weight.clone() for name, weight in fit.module.state_dict().items()}
    total = torch.zeros(len(examples))
    rows = Rows(examples, range(len(examples)))
    for checkpoint in fit.trace.checkpoints:
        fit.module.load_state_dict(dict(checkpoint.weights()))
        with torch.no_grad():
            for start in range(0, len(rows), 200):
                batch = trimmed([rows[each] for each in range(start, min(start + 200, len(rows)))])
                losses = functional.cross_entropy(fit.module(batch), batch["labels"], reduction="none")
                total[start : start + len(losses)] += losses
    fit.module.load_state_dict(kept)
    return total / len(fit.trace.checkpoints)
