"""A squared error in the place of a cross-entropy: how do checkpoints weigh where no label has a probability?

The mean ratings of movie reviews, by the convolutional network, held to networks fitted to random halves.

python -m benchmarks.evidence.ratings        half an hour on a core; what is there is not run again
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.evidence import texts
from benchmarks.evidence.baselines.of_fit import random_scores, tf_idf
from benchmarks.evidence.examples import encoded
from benchmarks.evidence.fitting import Fitted, fitted
from benchmarks.evidence.halves import halves_of
from benchmarks.evidence.lds import lds_table
from benchmarks.evidence.networks import Convolutional, UnrecordedConvolutional
from benchmarks.evidence.ours import RARER, Scorer, of_components
from benchmarks.evidence.scored import kept_scores
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import CNN
from lightning_tracin import TracInLast, TracInRidge, TracInWE

_WEIGHTS: tuple[Literal["equal", "residual"], ...] = ("equal", "residual")


class Rating(Convolutional):
    """The convolutional network with one output, a rating, and a squared error."""

    def influence_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The squared error of each example."""
        return functional.mse_loss(self(batch)[:, 0], batch["labels"], reduction="none")

    def influence_label_names(self) -> dict[int, str]:
        """None: labels are ratings."""
        return {}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The rating, (B, 1)."""
        outputs: Tensor = self(batch)
        return outputs


class UnrecordedRating(UnrecordedConvolutional, Rating):
    """The same, fitted faster."""


def ratings_cnn() -> Task:
    """Movie ratings: 1,600 sentences, 120 tested; the convolutional network with a squared error."""
    rated = texts.ratings()
    rated = random.Random(0).sample(rated, len(rated))
    (train, test), vocabulary = encoded((rated[:1600], rated[1600:1720]), 24)
    recipe = replace(CNN, network=Rating, unrecorded=UnrecordedRating)
    return Task("ratings-cnn", "Movie ratings, CNN, squared error", train, test, ("rating",), vocabulary, recipe)


def agreement(fit: Fitted) -> Tensor:
    """How far a test and a training example are on the same side of the mean rating: the product of their distances."""
    mean = fit.task.train.labels.mean()
    return (fit.task.test.labels - mean)[:, None] * (fit.task.train.labels - mean)


BASELINES: dict[str, Scorer] = {
    "random": random_scores,
    "agreement of ratings": agreement,
    "TF-IDF": partial(tf_idf, otherwise=None),
    "TF-IDF x agreement": lambda fit: tf_idf(fit, None) * agreement(fit),
}


def ours() -> Iterator[tuple[str, Scorer]]:
    """Each method with checkpoints that count alike, and by residuals; ridges with each power of residuals."""
    products = {"TracIn-WE": TracInWE, "TracIn-Last": TracInLast}
    for weights in _WEIGHTS:
        for name, kind in products.items():
            yield f"{name}, {weights}", partial(Fitted.scores, method=kind(weights=weights))
            cosine = kind(normalize="cosine", weights=weights)
            yield f"{name}, cosine, {weights}", partial(Fitted.scores, method=cosine)
        words = TracInWE(normalize="cosine", weights=weights, **RARER)
        yield f"TracIn-WE, cosine, {weights}, no common words", partial(Fitted.scores, method=words)
        yield f"ridge, {weights}, no common words", partial(Fitted.scores, method=TracInRidge(words))
        yield f"K-FAC layers, {weights}", partial(of_components, weights=weights, words=0.0)
        yield f"R1: words and K-FAC layers, {weights}", partial(of_components, weights=weights, words=0.5)
        for power in (0.0, 0.5, 1.0):
            ridge = partial(of_components, weights=weights, words=0.5, power=power)
            yield f"R2: ridge, words and K-FAC layers, {weights}, power {power:g}", ridge
        rarer = partial(of_components, weights=weights, words=0.5, power=0.5, **RARER)
        yield f"R2, {weights}, power 0.5, no common words", rarer


def correlation(fit: Fitted) -> float:
    """Of predicted and true ratings of the test examples."""
    return float(torch.corrcoef(torch.stack([fit.probabilities()[:, 0], fit.task.test.labels]))[0, 1])


def main() -> None:
    """Fit, score, fit to halves, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="with which each half is fitted")
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="keeps fits, scores and retrainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/evidence/results"), help="of the table")
    options = parser.parse_args()
    task = ratings_cnn()
    fit = fitted(task, options.folder)
    known: dict[str, Callable[[Fitted], Tensor]] = {**BASELINES, **dict(ours())}
    scores = {name: kept_scores(options.folder, name, scorer, fit) for name, scorer in known.items()}
    halves = halves_of(task, options.folder, options.out / "halves", options.halves, range(options.seeds))
    table = lds_table(task, halves, scores, BASELINES, classes=(task.train.labels > task.train.labels.mean()).long())
    content = {
        "commands": ["python -m benchmarks.evidence.ratings"],
        "torch": torch.__version__,
        **table,
        "correlation": round(correlation(fit), 4),
    }
    path = options.out / "ratings-cnn.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(path)  # noqa: T201


if __name__ == "__main__":
    main()
