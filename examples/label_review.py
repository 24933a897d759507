"""Does it help to review the labels that self-influence points at, and more than to review as many at random?

Flips some labels of BBC News, trains a small network, and lets somebody who knows the truth review the first articles
of ``trainer.label_issues``: a CSV file goes out, comes back with ``corrected_label`` filled in, and
``apply_corrections`` gives the corrected training set. The network is trained on that again, on a training set of which
as many random articles were reviewed, and on the one without flipped labels. All of it happens several times, with
other flipped labels and another start each time. ``make labels`` runs it.

    python -m examples.label_review                                           # offline
    python -m examples.label_review --data ag_news                            # a name on the Hugging Face hub
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import WeightedRandomSampler
from transformers import AutoTokenizer

from examples.classifier import Tokenized, batches, be_quiet, predicted
from examples.data import Labelled, bbc_news, hub_data, packaged_minilm
from examples.sentiment import Network, word_vectors
from examples.topics import flip_labels
from lightning_tracin import TracInCallback, Trainer, apply_corrections

console = Console()

# The 97.5 % quantile of Student's t with n - 1 degrees of freedom, for n from 2 on: of few runs a mean is not sure.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

_SETTINGS = ("with flipped labels", "random articles reviewed", "label issues reviewed", "without flipped labels")


class Fits:
    """Fits of a small network, each from the start of a seed.

    Args:
        test: labelled texts that accuracy is measured on.
        names: of the labels.
        options: of the command line.
    """

    def __init__(self, test: Labelled, names: Sequence[str], options: argparse.Namespace) -> None:
        model = options.model or packaged_minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.vectors: Tensor = word_vectors(model)
        self.names = names
        self.options = options
        self.truth = torch.tensor([label for _, label in test])
        self.test = self.tokenized(test)

    def tokenized(self, texts: Labelled) -> Tokenized:
        """Texts as token ids."""
        return Tokenized(texts, self.tokenizer, self.options.max_length)

    def fitted(self, train: Labelled, seed: int, *callbacks: Any, weights: Tensor | None = None) -> Trainer:
        """A trainer that has fitted the network; with weights, those say how often each text is drawn."""
        pl.seed_everything(seed, verbose=False)
        trainer = Trainer(
            max_epochs=self.options.epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        network = Network(self.vectors, self.names, self.tokenizer)
        sampler = None if weights is None else WeightedRandomSampler(weights.tolist(), len(weights))
        trainer.fit(network, batches(self.tokenized(train), self.tokenizer, shuffle=weights is None, sampler=sampler))
        return trainer

    def accuracy(self, trainer: Trainer) -> float:
        """The share of test texts that a trainer's network is right about."""
        said = predicted(trainer, self.test, self.tokenizer).argmax(1)
        return (said == self.truth).float().mean().item()


def review(path: Path, truth: Labelled, names: Sequence[str], n: int) -> Path:
    """What somebody does who knows the truth: fill in the corrected label in the first rows of a file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows[:n]:
        right = names[truth[int(row["train_index"])][1]]
        row["corrected_label"] = "" if right == row["given_label"] else right
    reviewed = path.with_name("reviewed.csv")
    with reviewed.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return reviewed


def run(clean: Labelled, fits: Fits, seed: int) -> tuple[list[float], dict[str, float]]:
    """The accuracy of each setting, and what was found, with the flipped labels and the start of a seed."""
    options = fits.options
    given, flipped = flip_labels(clean, options.flip, len(fits.names), seed)
    n_reviewed = round(options.review * len(given))
    callback = TracInCallback(options.output / "trace", methods=("tracin-last",), overwrite=True)
    trainer = fits.fitted(given, seed, callback)
    before = fits.accuracy(trainer)

    issues = trainer.label_issues(texts=[text for text, _ in given])
    if seed == options.seed:
        console.print(issues)
    first = {each.example.index for each in issues.issues[:n_reviewed]}
    wrong = {each.example.index for each in issues.issues if each.is_label_issue}
    found = {
        "flipped": len(flipped),
        "among the reviewed": len(flipped & first),
        "probably wrong": len(wrong),
        "of these flipped": len(flipped & wrong),
    }
    path = review(issues.to_csv(options.output / "label_issues.csv"), clean, fits.names, n_reviewed)
    corrected = apply_corrections(given, path, names=fits.names)

    at_random = set(random.Random(-1 - seed).sample(range(len(given)), n_reviewed))
    otherwise = [clean[index] if index in at_random else each for index, each in enumerate(given)]
    after = [fits.accuracy(fits.fitted(train, seed)) for train in (otherwise, corrected, clean)]
    return [before, *after], {name: float(number) for name, number in found.items()}


def interval(values: Sequence[float]) -> str:
    """A mean and its 95 % interval, in percent."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1%}"
    half = _STUDENT[min(len(values), len(_STUDENT) + 1) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1%} ± {half:.1%}"


def compared(settings: Sequence[str], accuracies: Sequence[Sequence[float]], over: Mapping[str, int]) -> Table:
    """The accuracies of all settings, and each one's gain over some of them, of the same seeds.

    Args:
        settings: names of the settings.
        accuracies: for each seed, that of each setting.
        over: for each column of gains, the number of the setting that they are over.
    """
    table = Table(title=f"Accuracy over {len(accuracies)} seeds, with 95 % intervals")
    for column in ("trained", "accuracy", *over):
        table.add_column(column, justify="left" if column == "trained" else "right", no_wrap=True)
    for number, name in enumerate(settings):
        gains = {base: [each[number] - each[base] for each in accuracies] for base in over.values()}
        shown = ["" if number == base else interval(of_base) for base, of_base in gains.items()]
        table.add_row(name, interval([each[number] for each in accuracies]), *shown)
    return table


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose word vectors: a Hugging Face name or a folder (default: MiniLM-L6)")
    parser.add_argument("--data", help="a data set on the hub with text and label (default: BBC News)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train-size", type=int, default=600)
    parser.add_argument("--test-size", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=48, help="tokens of each article")
    parser.add_argument("--flip", type=float, default=0.2, help="share of training labels flipped on purpose")
    parser.add_argument("--review", type=float, default=0.25, help="share of the training set that is reviewed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("demo_output/labels"), help="where trace and tables go")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--small", action="store_true", help="a quick look, at other defaults")
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(train_size=300, test_size=500, max_length=32, seeds=2)
        options = parser.parse_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Flip, train, review, correct, train again; returns the figures that were printed."""
    options = parsed(arguments)
    be_quiet()
    started = time.monotonic()
    texts, names = hub_data(options.data) if options.data else bbc_news()
    random.Random(options.seed).shuffle(texts)
    clean, test = texts[: options.train_size], texts[-options.test_size :]
    fits = Fits(test, names, options)
    runs = [run(clean, fits, options.seed + number) for number in range(options.seeds)]
    accuracies, found = [each for each, _ in runs], [each for _, each in runs]
    means = {name: statistics.mean(each[name] for each in found) for name in found[0]}
    console.print(
        f"\nOf {means['flipped']:.0f} flipped labels, {means['among the reviewed']:.0f} are among the first "
        f"{options.review:.0%} of the table. Of {means['probably wrong']:.0f} labels that it calls probably wrong, "
        f"{means['of these flipped']:.0f} are flipped.\n"
    )
    console.print(compared(_SETTINGS, accuracies, {"gain": 0}))
    console.print(
        f"\nThe reviewed table of the last run: {options.output / 'reviewed.csv'}. "
        f"{time.monotonic() - started:.0f} s in all."
    )
    return {"accuracies": accuracies, "found": found}


if __name__ == "__main__":
    main()
