"""In which order do training examples with wrong labels come first: by self-influence, or by it within a class?

Flips labels, trains the network of the label review, and tells flipped examples from others (AUROC) by the
self-influence of each, as it is and compared with the examples that have the same label. Flipped at random, an eighth
of the SMS messages are spam, so that classes are not equally large there.

    python -m benchmarks.label_orders
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.classifier import be_quiet
from examples.data import Labelled, bbc_news, movie_reviews, sms_spam
from examples.label_review import Fits, interval, parsed
from examples.topics import flip_labels
from lightning_tracin import TracInCallback, TracInLast, TracInRidge
from lightning_tracin.metrics.functional import mislabel_detection_auroc

console = Console()

_DATA: dict[str, Callable[[], tuple[Labelled, list[str]]]] = {
    "BBC News": bbc_news,
    "SMS spam": sms_spam,
    "movie reviews": movie_reviews,
}


def by_class(values: Tensor, labels: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    """(n,) what is made of the values of each class by themselves."""
    found = torch.empty_like(values)
    for label in torch.unique(labels):
        found[labels == label] = how(values[labels == label])
    return found


def rank(values: Tensor) -> Tensor:
    """(n,) how many of the values are smaller, as a share."""
    return values.argsort().argsort() / len(values)


_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "over the mean of the class": lambda values: values / values.mean(),
    "z-score of logarithms in the class": lambda values: (
        (values.clamp(min=1e-12).log() - values.clamp(min=1e-12).log().mean()) / values.clamp(min=1e-12).log().std()
    ),
    "rank in the class": rank,
}


def measured(name: str, share: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """The AUROC of each order, for each seed."""
    texts, names = _DATA[name]()
    random.Random(options.seed).shuffle(texts)
    clean = texts[: options.train_size]
    fits = Fits(texts[:1], names, options)
    found: dict[str, list[float]] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        given, flipped = flip_labels(clean, share, len(names), seed)
        labels = torch.tensor([label for _, label in given])
        with tempfile.TemporaryDirectory() as folder:
            callback = TracInCallback(Path(folder) / "trace", methods=("tracin-last",))
            trainer = fits.fitted(given, seed, callback)
            plain = trainer.self_influence(method="tracin-last")
            in_class = trainer.self_influence(method="tracin-last", within_class=True)
            ridge = trainer.self_influence(method=TracInRidge(TracInLast(normalize="cosine"), residual=1))
        orders = {
            "as it is": plain,
            "z-score in the class": in_class,
            **{order: by_class(plain, labels, how) for order, how in _ORDERS.items()},
        }
        orders["leverage (TracInRidge, residual=1)"] = ridge
        orders["leverage, rank in the class"] = by_class(ridge, labels, rank)
        is_flipped = torch.tensor([index in flipped for index in range(len(given))])
        for order, scores in orders.items():
            found.setdefault(order, []).append(float(mislabel_detection_auroc(scores, is_flipped)))
    return found


def main() -> None:
    """Measure all, and print a table."""
    options = parsed(None)
    be_quiet()
    columns = {}
    for name in _DATA:
        for share in (0.05, 0.2):
            columns[f"{name}, {share:.0%}"] = measured(name, share, options)
            console.print(
                name, share, {order: interval(each) for order, each in columns[f"{name}, {share:.0%}"].items()}
            )
    table = Table(title=f"AUROC of flipped labels, {options.seeds} seeds; differences from the first row below")
    for column in ("order", *columns):
        table.add_column(column)
    first = next(iter(columns.values()))
    for order in first:
        table.add_row(order, *(interval(each[order]) for each in columns.values()))
        if order != "as it is":
            pairs = [zip(each[order], each["as it is"], strict=True) for each in columns.values()]
            table.add_row("", *(interval([a - b for a, b in each]) for each in pairs))
    console.print(table)


if __name__ == "__main__":
    main()
