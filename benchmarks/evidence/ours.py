"""The product's own methods in the study, each a function from a fitted task to scores (n_test, n_train)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.networks import Convolutional
from benchmarks.evidence.task import Task
from benchmarks.evidence.word_kfac import word_kfac
from lightning_tracin import TracInLast, TracInLayer, TracInRidge, TracInSum, TracInWE

Scorer: TypeAlias = Callable[[Fitted], Tensor]

_LATE: dict[str, Any] = {
    "normalize": "cosine",
    "weights": "residual",
}  # cosines, checkpoints weighted by what is yet to be learned
RARER: dict[str, Any] = {"exclude_tokens": ("special", "common")}
_KFAC: dict[str, Any] = {**_LATE, "precondition": "kfac"}


def ours(task: Task) -> Mapping[str, Scorer]:
    """The product's methods by name.

    Args:
        task: whose recorded layers are summed.
    """
    is_from_scratch = issubclass(task.recipe.network, Convolutional)
    words = 0.5 if is_from_scratch else 0.25  # what the word table counts in a sum
    found: dict[str, Scorer] = {
        "TracIn-WE": partial(Fitted.scores, method=TracInWE()),
        "TracIn-Last": partial(Fitted.scores, method=TracInLast()),
        "WE cosine": partial(Fitted.scores, method=TracInWE(normalize="cosine")),
        "Last cosine": partial(Fitted.scores, method=TracInLast(normalize="cosine")),
        "WE Adam": partial(Fitted.scores, method=TracInWE(precondition="adam")),
        "WE, last checkpoint": partial(Fitted.scores, method=TracInWE(), checkpoints="last"),
        "WE cosine, residual": partial(Fitted.scores, method=_words()),
        "WE K-FAC, residual (trial)": word_kfac,
        "WE K-FAC, frequencies alone (trial)": partial(word_kfac, hidden=False),
        "WE K-FAC, hidden covariance alone (trial)": partial(word_kfac, frequencies=False),
        "Last cosine, residual": partial(Fitted.scores, method=TracInLast(**_LATE)),
        "K-FAC layers, residual": partial(of_components, words=0.0),
        "R1: words and K-FAC layers": partial(of_components, words=words),
        "R2: ridge, words and K-FAC layers": partial(of_components, words=0.5, power=0.5),
        "WE cosine, residual, no common words": partial(Fitted.scores, method=_words(**RARER)),
        "R1, no common words": partial(of_components, words=words, **RARER),
        "R1, words by Adam": partial(of_components, words=words, precondition="adam"),
        "R1, words by Adam, no common words": partial(of_components, words=words, precondition="adam", **RARER),
        "R2, no common words": partial(of_components, words=0.5, power=0.5, **RARER),
        "R2, words by Adam": partial(of_components, words=0.5, power=0.5, precondition="adam"),
        "ridge, words": partial(Fitted.scores, method=TracInRidge(_words())),
        "ridge, no common words": partial(Fitted.scores, method=TracInRidge(_words(**RARER))),
        "ridge without residuals, words": partial(Fitted.scores, method=TracInRidge(_words(), residual=0)),
    }
    if is_from_scratch:  # of all layers of a transformer, whole gradients take gigabytes
        found["layers, products"] = lambda fit: fit.scores(_sum(_linear(fit)))
        found["layers, cosines, residual"] = lambda fit: fit.scores(_sum(_linear(fit, **_LATE)))
        found["K-FAC layers, full width"] = lambda fit: fit.scores(_sum(_linear(fit, **_KFAC)))
        found["R1, full width"] = lambda fit: fit.scores(_sum((_words(), *_linear(fit, **_KFAC)), words))
    return found


def of_components(
    fit: Fitted, words: float, *, weights: Any = "residual", power: float | None = None, **of_words: Any
) -> Tensor:
    """K-FAC cosines of all layers, and as much of the word table's cosine.

    Args:
        fit: of a task.
        words: what the word table counts; 0 for the layers alone.
        weights: of the checkpoints.
        power: of the residuals in the dual ridge on these kernels; None: without the ridge.
        of_words: further options of the word table.
    """
    fit = fit.in_components()
    options: dict[str, Any] = {"normalize": "cosine", "weights": weights}
    layers = _linear(fit, **options, precondition="kfac")
    method = _sum((TracInWE(**options, **of_words), *layers), words) if words else _sum(layers)
    return fit.scores(method if power is None else TracInRidge(method, residual=power))


def _words(**options: Any) -> TracInWE:
    return TracInWE(**_LATE, **options)


def _linear(fit: Fitted, **options: Any) -> tuple[TracInLayer | TracInLast, ...]:
    """The recorded layers and the last one, as methods with some options."""
    layers = [site.layer for site in fit.trace.checkpoints[0].sites if not site.has_words and not site.is_last]
    return (*(TracInLayer(each, **options) for each in layers), TracInLast(**options))


def _sum(parts: Sequence[TracInWE | TracInLayer | TracInLast], words: float | None = None) -> TracInSum:
    """The sum of several parts, each divided by its standard deviation.

    Args:
        parts: the first of which is the word table, if ``words`` is given.
        words: what that counts, the others having the rest in equal shares; None: all alike.
    """
    mix = None if words is None else (words, *[(1 - words) / (len(parts) - 1)] * (len(parts) - 1))
    return TracInSum(parts, mix=mix)
