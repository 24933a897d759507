"""Does it help to draw training examples by their influence on a few trusted ones, where labels are noisy?

Flips many labels of BBC News, trains a small network, and asks for the influence of every article on a few whose labels
are right (the idea of Ren et al. 2020, arXiv 2007.01293). A WeightedRandomSampler then draws articles by it, and the
network is trained again from the same start. For comparison the trusted articles are added to the training set, which
uses the same knowledge without any influence; and both are done. Several seeds, with other articles, flips and another
start each. ``make weights`` runs it.

    python -m examples.reweighting                                            # offline
    python -m examples.reweighting --data ag_news                             # a name on the Hugging Face hub
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from examples.classifier import batches, be_quiet
from examples.data import Labelled, bbc_news, hub_data
from examples.label_review import Fits, compared, interval
from examples.topics import flip_labels
from lightning_tracin import TracInCallback, TracInLayer
from lightning_tracin.metrics.functional import mislabel_detection_auroc

console = Console()

_SETTINGS = (
    "as they are",
    "drawn by influence",
    "trusted added",
    "trusted added, drawn by influence",
    "without flipped labels",
)


def weights_of(helpful: Tensor, labels: Tensor) -> Tensor:
    """(n,) how often each example is drawn: by its rank in its class, the most harmful never and the most helpful most.

    By ranks over all classes, those that the network says too seldom would be drawn more, and others all but left out.
    """
    weights = torch.empty(len(helpful))
    for label in torch.unique(labels):
        of_class = helpful[labels == label]
        weights[labels == label] = of_class.argsort().argsort() / len(of_class)
    return weights


def run(given: Labelled, clean: Labelled, trusted: Labelled, fits: Fits, seed: int) -> tuple[list[float], float]:
    """The accuracy of each setting, and how often a flipped article is below another (AUROC), with a seed."""
    options = fits.options
    callback = TracInCallback(options.output / "trace", methods=("features",), overwrite=True)
    trainer = fits.fitted(given, seed, callback)
    before = fits.accuracy(trainer)
    method = TracInLayer("features", normalize="cosine")
    result = trainer.influence(batches(fits.tokenized(trusted), fits.tokenizer), method=method)
    helpful = result.aggregate("mean")
    weights = weights_of(helpful, torch.tensor([label for _, label in given]))
    of_both = torch.cat([weights, torch.full((len(trusted),), float(weights.max()))])
    trainers = (
        fits.fitted(given, seed, weights=weights),
        fits.fitted([*given, *trusted], seed),
        fits.fitted([*given, *trusted], seed, weights=of_both),
        fits.fitted(clean, seed),
    )
    is_flipped = torch.tensor([a[1] != b[1] for a, b in zip(given, clean, strict=True)])
    auroc = mislabel_detection_auroc(-helpful, is_flipped)
    return [before, *map(fits.accuracy, trainers)], float(auroc)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose word vectors: a Hugging Face name or a folder (default: MiniLM-L6)")
    parser.add_argument("--data", help="a data set on the hub with text and label (default: BBC News)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-size", type=int, default=400)
    parser.add_argument("--trusted", type=int, default=100, help="articles whose labels are known to be right")
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=32, help="tokens of each article")
    parser.add_argument("--flip", type=float, default=0.4, help="share of training labels flipped on purpose")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("demo_output/weights"), help="where the trace goes")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Flip, train, weigh, train again; returns the figures that were printed."""
    options = parsed(arguments)
    be_quiet()
    started = time.monotonic()
    texts, names = hub_data(options.data) if options.data else bbc_news()
    accuracies, aurocs = [], []
    for seed in range(options.seed, options.seed + options.seeds):
        drawn = random.Random(seed).sample(texts, len(texts))
        clean, trusted = drawn[: options.train_size], drawn[options.train_size :][: options.trusted]
        given, _ = flip_labels(clean, options.flip, len(names), seed)
        fits = Fits(drawn[-options.test_size :], names, options)
        of_seed, auroc = run(given, clean, trusted, fits, seed)
        accuracies.append(of_seed)
        aurocs.append(auroc)
    console.print(compared(_SETTINGS, accuracies, {"gain": 0, "over trusted added": 2}))
    console.print(
        f"A flipped article's influence is below another's in {interval(aurocs)} of all pairs. "
        f"{time.monotonic() - started:.0f} s in all."
    )
    return {"accuracies": accuracies, "aurocs": aurocs}


if __name__ == "__main__":
    main()
