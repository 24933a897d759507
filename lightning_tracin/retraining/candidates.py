"""The methods that a recommendation chooses from, and what each must be better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_tracin.gradients.sites import Site, last_site, words_site
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.retraining.tf_idf import tf_idf_cosines
from lightning_tracin.scoring.methods import Method, TracInLast, TracInLayer, TracInSum, TracInWE, Weights

Candidates: TypeAlias = Mapping[str, Method]


def candidate_methods(sites: Sequence[Site]) -> dict[str, Method]:
    """The methods that make sense for what a trace has recorded, by name.

    Args:
        sites: of the trace.
    """
    words, last = words_site(sites), last_site(sites)
    weights: Weights = "learning-rate" if last is None else "residual"  # residuals are read at the last layer
    inner = [TracInLayer(site.layer, normalize="cosine", weights=weights) for site in sites if _is_inner(site)]
    found: dict[str, Method] = {}
    if words is not None:
        found["words"] = TracInWE()
        found["words, cosine"] = TracInWE(normalize="cosine", weights=weights)
    if last is not None:
        found["last layer"] = TracInLast()
        found["last layer, cosine"] = TracInLast(normalize="cosine", weights=weights)
    if len(inner) == 1:
        found["inner layer, cosine"] = inner[0]
    if len(inner) > 1:
        found["inner layers, cosine"] = TracInSum(tuple(inner))
    if inner and words is not None:
        share = 1 / len(inner)
        parts: tuple[TracInWE | TracInLayer, ...] = (TracInWE(normalize="cosine", weights=weights), *inner)
        found["words and inner layers, cosine"] = TracInSum(parts, mix=(1.0, *([share] * len(inner))))
    return found


def baseline_scores(test: Texts, train: Texts) -> dict[str, Tensor]:
    """Scores (n_test, n_train) without any model, which a method must beat to be worth its cost.

    Args:
        test: token ids and labels of the test examples.
        train: those of the training examples.

    Returns:
        "same label": 1 where the labels agree, so that the sum is their number; "tf-idf": likeness by words, times 1
        where the labels agree and -1 where not. Without labels "tf-idf" alone.
    """
    cosines = tf_idf_cosines(test, train)
    if bool(test.labels.isnan().any()) or bool(train.labels.isnan().any()):
        return {"tf-idf": cosines}
    agree = (test.labels[:, None] == train.labels).float()
    if bool((agree == agree[:1, :1]).all()):
        return {"tf-idf": cosines}
    return {"same label": agree, "tf-idf": cosines * torch.where(agree > 0, 1.0, -1.0)}


def _is_inner(site: Site) -> bool:
    return not site.has_words and not site.is_last
