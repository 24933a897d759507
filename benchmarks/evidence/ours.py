"""The product's own methods in the study, each a function from a fitted task to scores (n_test, n_train)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from typing import TypeAlias

from torch import Tensor

from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.networks import Convolutional
from benchmarks.evidence.task import Task
from lightning_tracin import TracInLast, TracInLayer, TracInRidge, TracInSum, TracInWE

Scorer: TypeAlias = Callable[[Fitted], Tensor]

_LATE = {"normalize": "cosine", "weights": "residual"}  # cosines, checkpoints weighted by what is yet to be learned
_KFAC = {**_LATE, "precondition": "kfac"}


def ours(task: Task) -> Mapping[str, Scorer]:
    """The product's methods by name.

    Args:
        task: whose recorded layers are summed.
    """
    words = 0.5 if issubclass(task.recipe.network, Convolutional) else 0.25  # what the word table counts in a sum
    return {
        "TracIn-WE": partial(Fitted.scores, method=TracInWE()),
        "TracIn-Last": partial(Fitted.scores, method=TracInLast()),
        "WE cosine": partial(Fitted.scores, method=TracInWE(normalize="cosine")),
        "Last cosine": partial(Fitted.scores, method=TracInLast(normalize="cosine")),
        "WE Adam": partial(Fitted.scores, method=TracInWE(precondition="adam")),
        "WE, last checkpoint": partial(Fitted.scores, method=TracInWE(), checkpoints="last"),
        "WE cosine, residual": partial(Fitted.scores, method=_words()),
        "Last cosine, residual": partial(Fitted.scores, method=TracInLast(**_LATE)),  # type: ignore[arg-type]
        "layers, products": lambda fit: fit.scores(_sum((TracInWE(), *_linear(fit)), None, plain=True)),
        "layers, cosines, residual": lambda fit: fit.scores(_sum((_words(), *_linear(fit, **_LATE)), None, plain=True)),
        "K-FAC layers, residual": lambda fit: fit.scores(_sum(_linear(fit, **_KFAC), None)),
        "R1: words and K-FAC layers": lambda fit: fit.scores(_sum((_words(), *_linear(fit, **_KFAC)), words)),
        "R2: ridge, words and layers": lambda fit: fit.scores(
            TracInRidge(_sum((_words(), *_linear(fit, **_LATE)), 0.5))
        ),
        "ridge, words": partial(Fitted.scores, method=TracInRidge(_words())),
        "ridge without residuals, words": partial(Fitted.scores, method=TracInRidge(_words(), residual=0)),
    }


def _words() -> TracInWE:
    return TracInWE(**_LATE)  # type: ignore[arg-type]


def _linear(fit: Fitted, **options: str) -> tuple[TracInLayer | TracInLast, ...]:
    """The layers of the task's recipe, and the last one, as methods with some options."""
    recorded = [site for site in fit.trace.checkpoints[0].sites if not site.has_words]
    wanted = [each for each in recorded if any(fnmatch(each.layer, name) for name in fit.task.recipe.layers)]
    layers = [TracInLayer(site.layer, **options) for site in wanted]  # type: ignore[arg-type]
    return (*layers, TracInLast(**options))  # type: ignore[arg-type]


def _sum(
    parts: tuple[TracInWE | TracInLayer | TracInLast, ...], words: float | None, *, plain: bool = False
) -> TracInSum:
    """The sum of several parts.

    Args:
        parts: the first of which is the word table, if ``words`` is given.
        words: what that counts, the others having the rest in equal shares; None: all alike.
        plain: not divided by standard deviations.
    """
    mix = None if words is None else (words, *[(1 - words) / (len(parts) - 1)] * (len(parts) - 1))
    return TracInSum(parts, mix=mix, scales=(1.0,) * len(parts) if plain else None)
