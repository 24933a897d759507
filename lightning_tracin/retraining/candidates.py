"""The methods that a recommendation chooses from, and what each must be better than."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_tracin.gradients.sites import Site, last_site, words_site
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.retraining.tf_idf import tf_idf_cosines
from lightning_tracin.scoring.methods import Method, TracInLast, TracInLayer, TracInSum, TracInWE, Weights
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.scoring.terms import stored_site, training_sites_of

_LANDMARKS = 4000  # training examples, up to which a ridge compares all with all: 130 MB


def candidate_methods(sites: Sequence[Site], n_train: int, *, uncommon: bool = False) -> dict[str, Method]:
    """The methods that make sense for what a trace has recorded, by name.

    They are the plain ones, their cosines, K-FAC at all linear layers, both together, and dual ridges on the words and
    on both together: with K-FAC, or with cosines alone where the trace keeps what K-FAC cannot use.

    Args:
        sites: of the trace.
        n_train: number of training examples.
        uncommon: whether ridges are tried without common words, too, which the trace's texts tell.
    """
    words, last = words_site(sites), last_site(sites)
    linear = [site for site in sites if not site.has_words]
    weights: Weights = "learning-rate" if last is None else "residual"  # residuals are read at the last layer
    of_words = [] if words is None else [TracInWE(normalize="cosine", weights=weights)]
    of_uncommon = [replace(each, exclude_tokens=("common",)) for each in of_words if uncommon]
    cosines = [TracInLayer(site.layer, normalize="cosine", weights=weights) for site in linear]
    whitened = [replace(each, precondition="kfac") for each in cosines]
    of_layers = [layers for layers in (whitened, cosines) if layers]
    both = [_sum(of_words, layers) for layers in of_layers if of_words]
    ridges = [
        ("words, ridge", _sum(of_words, [])),
        ("uncommon words, ridge", _sum(of_uncommon, [])),
        *(("words and layers, ridge", each) for each in both),
        *(("uncommon words and layers, ridge", _sum(of_uncommon, layers)) for layers in of_layers if of_uncommon),
    ]
    found: dict[str, Method | None] = {
        "words": TracInWE(),
        "words, cosine": _sum(of_words, []),
        "last layer": TracInLast(),
        "last layer, cosine": TracInLast(normalize="cosine", weights=weights),
        "layers, K-FAC": _sum([], whitened),
        "words and layers, K-FAC": both[0] if both else None,
    }
    recorded: dict[str, Method] = {
        name: each for name, each in found.items() if each is not None and _is_recorded(each, sites)
    }
    landmarks = None if n_train <= _LANDMARKS else _LANDMARKS
    residual = 0.0 if last is None else 0.5
    for name, kernel in ridges:
        if kernel is None or name in recorded:
            continue
        ridge = TracInRidge(kernel, residual=residual, landmarks=landmarks)
        if _is_recorded(ridge, sites):
            recorded[name] = ridge
    return recorded


def _sum(words: Sequence[TracInWE], layers: Sequence[TracInLayer]) -> TracInWE | TracInLayer | TracInSum | None:
    """Words and layers, each half; a method alone where there is one, None where there is none."""
    parts: list[TracInWE | TracInLayer] = [*words, *layers]
    if len(parts) < 2:
        return parts[0] if parts else None
    shares = [1.0] * len(words) + [1 / len(layers)] * len(layers)
    return TracInSum(tuple(parts), mix=tuple(shares))


def _is_recorded(method: Method, sites: Sequence[Site]) -> bool:
    """Whether a trace has what a method needs, in the form that it needs, or can compute it."""
    try:
        training_sites_of(method, sites)
        for summand in method.summands:
            stored_site(summand.method, sites)
    except ValueError:
        return False
    return True


def baseline_scores(test: Texts, train: Texts) -> dict[str, Tensor]:
    """Scores (n_test, n_train) without any model, which a method must beat to be worth its cost.

    Args:
        test: token ids and labels of the test examples.
        train: those of the training examples.

    Returns:
        "same label": 1 where the labels agree, so that the sum is their number; "tf-idf": likeness by words, times 1
        where the labels agree, -1 where not, and 0 where one is not known, as of what was never drawn. Without labels
        that differ "tf-idf" alone, without signs.
    """
    cosines = tf_idf_cosines(test, train)
    is_known = ~(test.labels[:, None].isnan() | train.labels.isnan())
    agree = test.labels[:, None] == train.labels  # NaN is none's
    told = agree[is_known]
    if bool(told.all()) or not bool(told.any()):
        return {"tf-idf": cosines}
    return {"same label": agree.float(), "tf-idf": cosines * torch.where(agree, 1.0, -1.0) * is_known}
