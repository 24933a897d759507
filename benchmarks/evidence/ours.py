"""The product's own methods in the study, each a function from a fitted task to scores (n_test, n_train)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from torch import Tensor

from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.task import Task
from lightning_tracin import TracInLast, TracInLayer, TracInSum, TracInWE
from lightning_tracin.gradients.sites import Site

Scorer: TypeAlias = Callable[[Fitted], Tensor]


def ours(task: Task) -> Mapping[str, Scorer]:
    """The product's methods by name.

    Args:
        task: whose recorded layers are summed.
    """
    found: dict[str, Scorer] = {
        "TracIn-WE": partial(Fitted.scores, method=TracInWE()),
        "TracIn-Last": partial(Fitted.scores, method=TracInLast()),
        "WE cosine": partial(Fitted.scores, method=TracInWE(normalize="cosine")),
        "Last cosine": partial(Fitted.scores, method=TracInLast(normalize="cosine")),
        "WE Adam": partial(Fitted.scores, method=TracInWE(precondition="adam")),
        "WE, last checkpoint": partial(Fitted.scores, method=TracInWE(), checkpoints="last"),
        "all layers": partial(_of_layers, normalize=None),
        "all layers, cosine": partial(_of_layers, normalize="cosine"),
    }
    return found


def _of_layers(fitted: Fitted, normalize: str | None) -> Tensor:
    """The sum over words, last layer and all recorded layers."""
    return fitted.scores(TracInSum(tuple(_part(site, normalize) for site in fitted.trace.sites)))


def _part(site: Site, normalize: str | None) -> TracInWE | TracInLast | TracInLayer:
    if site.has_words:
        return TracInWE(normalize=normalize)  # type: ignore[arg-type]
    if site.is_last:
        return TracInLast(normalize=normalize)  # type: ignore[arg-type]
    return TracInLayer(site.layer, normalize=normalize)  # type: ignore[arg-type]
