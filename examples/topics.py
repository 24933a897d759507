"""Which training articles, and which words in them, made the model file this article under that topic?

Fine-tunes a pretrained transformer on BBC News with 5 % of the training labels flipped on purpose, then asks where its
predictions come from, and whether self-influence finds the flipped labels. ``make demo`` runs it.

    python -m examples.topics                                                      # MiniLM-L6 and BBC News, offline
    python -m examples.topics --model distilbert-base-uncased --data ag_news       # names on the Hugging Face hub
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from examples.classifier import Classifier, Tokenized, batches, predicted
from examples.data import Labelled, bbc_news, hub_data, packaged_minilm
from lightning_tracin import InfluenceResult, TracInCallback, TracInLast, TracInWE, Trainer

console = Console()


def flip_labels(articles: Labelled, share: float, n_labels: int, seed: int) -> tuple[Labelled, set[int]]:
    """Give a share of the articles a wrong label.

    Returns:
        The articles, and the indices of those that were flipped.
    """
    generator = random.Random(seed)
    flipped = set(generator.sample(range(len(articles)), round(share * len(articles))))
    return [
        (text, (label + generator.randrange(1, n_labels)) % n_labels if index in flipped else label)
        for index, (text, label) in enumerate(articles)
    ], flipped


def chosen_articles(probabilities: Tensor, labels: Tensor) -> list[int]:
    """Three test articles: the worst mistake, if there is one, and right predictions of other topics."""
    losses = -probabilities[torch.arange(len(labels)), labels].log()
    right = probabilities.argmax(1) == labels
    chosen = [] if bool(right.all()) else [int(losses.masked_fill(right, -1).argmax())]
    topics = [int(labels[index]) for index in chosen]
    for index in torch.nonzero(right)[:, 0].tolist():
        if len(chosen) < 3 and int(labels[index]) not in topics:
            chosen.append(index)
            topics.append(int(labels[index]))
    return chosen


def found_table(flipped: set[int], scores: dict[str, Tensor]) -> Table:
    """How many flipped labels are among the examples of highest self-influence."""
    n_train = len(next(iter(scores.values())))
    table = Table(title=f"{len(flipped)} flipped labels of {n_train}: found by self-influence")
    for name in ("method", "top 5 %", "top 10 %", "top 20 %"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, values in scores.items():
        found = [len(flipped & set(values.topk(n_train * percent // 100).indices.tolist())) for percent in (5, 10, 20)]
        table.add_row(method, *(f"{count} ({count / len(flipped):.0%})" for count in found))
    table.add_row(
        "by chance", *(f"{len(flipped) * percent / 100:.0f} ({percent}%)" for percent in (5, 10, 20)), style="dim"
    )
    return table


def common_share(result: InfluenceResult, common: set[str]) -> float:
    """The share of common words among the 5 strongest words of each test article's 5 strongest proponents."""
    words = []
    for explanation in result.explanations(k=5):
        for proponent in explanation.proponents:
            terms: dict[str, float] = defaultdict(float)
            for word, term in zip(proponent.example.words, proponent.terms, strict=True):
                terms[word.text] += term
            words += sorted((word for word in terms if terms[word]), key=lambda word: -abs(terms[word]))[:5]
    return sum(word in common for word in words) / max(len(words), 1)


def compared(
    trainer: Trainer,
    loader: DataLoader[Any],
    said: Tensor,
    train_labels: Tensor,
    methods: dict[str, TracInWE | TracInLast],
    common: set[str],
) -> Table:
    """For some predictions: whether proponents have the label that the model said, and whether their words say much."""
    table = Table("method", title=f"The 5 strongest proponents of {len(said)} predictions")
    for column in ("same label", "common words"):
        table.add_column(column, justify="right")
    for name, method in methods.items():
        result = trainer.influence(loader, method=method, k=5, target="prediction")
        same = (train_labels[result.proponents(5).indices] == said[:, None]).float().mean().item()
        words = f"{common_share(result, common):.0%}" if isinstance(method, TracInWE) else ""
        table.add_row(name, f"{same:.0%}", words)
    return table


def draw_terminals(result: InfluenceResult, found: Table, folder: Path) -> None:
    """Draw the first answer as SVGs, as light and dark terminals of 80 and 120 columns show it."""
    folder.mkdir(parents=True, exist_ok=True)
    for width in (80, 120):
        recorder = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
        result.show(0, k=2, console=recorder)
        recorder.print(found)
        for scheme, theme in (("light", DEFAULT_TERMINAL_THEME), ("dark", SVG_EXPORT_THEME)):
            path = folder / f"terminal-{width}-{scheme}.svg"
            recorder.save_svg(str(path), title="trainer.influence(test_loader)", theme=theme, clear=False)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face name or a folder (default: MiniLM-L6 from its package)")
    parser.add_argument("--data", help="a data set on the hub with text and label (default: BBC News)")
    parser.add_argument("--layers", type=int, help="the first so many of the model's layers (default: all)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--train-size", type=int, default=1600)
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of each article")
    parser.add_argument("--flip", type=float, default=0.05, help="share of training labels flipped on purpose")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where trace, result and page go")
    parser.add_argument("--pictures", type=Path, help="a folder to draw the first answer in, as terminals show it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a quick look, at other defaults")
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(
            layers=2, learning_rate=3e-4, train_size=320, test_size=24, epochs=4, max_length=32, flip=0.1
        )
        options = parser.parse_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, ask, print; returns the figures that were printed."""
    options = parsed(arguments)
    started = time.monotonic()
    pl.seed_everything(options.seed, verbose=False)
    articles, topics = hub_data(options.data) if options.data else bbc_news()
    random.Random(options.seed).shuffle(articles)
    train, flipped = flip_labels(articles[: options.train_size], options.flip, len(topics), options.seed)
    test = articles[options.train_size : options.train_size + options.test_size]

    name = options.model or packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(name)
    train_set = Tokenized(train, tokenizer, options.max_length)

    def asking(some: Labelled) -> DataLoader[Any]:
        return batches(Tokenized(some, tokenizer, options.max_length), tokenizer)

    n_steps = options.epochs * -(-len(train) // 32)
    model = Classifier(name, topics, tokenizer, n_steps, options.learning_rate, options.layers)
    callback = TracInCallback(options.output / "trace", overwrite=True)
    trainer = Trainer(
        max_epochs=options.epochs, callbacks=[callback], logger=False, enable_checkpointing=False, log_every_n_steps=10
    )
    trainer.fit(model, batches(train_set, tokenizer, shuffle=True))
    fitted = time.monotonic()

    probabilities = predicted(trainer, Tokenized(test, tokenizer, options.max_length), tokenizer)
    said = probabilities.argmax(1)
    truth = torch.tensor([label for _, label in test])
    accuracy = (said == truth).float().mean().item()
    console.print(f"\nAccuracy on {len(test)} test articles: [bold]{accuracy:.3f}[/]")

    method = TracInWE(normalize="cosine", exclude_tokens=("special", "common"))
    chosen = chosen_articles(probabilities, truth)
    # As a text from production comes: without a label. The tokenizer and the collate function are those of training.
    result = trainer.influence([test[index][0] for index in chosen], method=method, target="prediction")
    result = result.with_texts(train=[text for text, _ in train])
    for row, index in enumerate(chosen):
        topic = result.target_names[row]
        verdict = "and so it is" if said[index] == truth[index] else f"but it is {topics[test[index][1]]}"
        console.print(
            f"\n[bold]Test article {index}[/]: the model says [bold]{topic}[/] ({probabilities[index].max():.0%}), "
            f"{verdict}. What taught it to say {topic}?"
        )
        result.show(row, k=3, console=console)

    scores = {name: trainer.self_influence(method=name) for name in ("tracin-we", "tracin-last")}
    flipped_table = found_table(flipped, scores)
    n_compared = min(40, len(test))
    comparison = compared(
        trainer,
        asking(test[:n_compared]),
        said[:n_compared],
        torch.tensor([label for _, label in train]),
        {
            "tracin-we": TracInWE(exclude_tokens="special"),
            "tracin-we, cosine": TracInWE(normalize="cosine", exclude_tokens="special"),
            "tracin-we, cosine, adam": TracInWE(normalize="cosine", precondition="adam", exclude_tokens="special"),
            "tracin-we, cosine, common words left out": method,
            "tracin-we, cosine, adam, common words left out": replace(method, precondition="adam"),
            "tracin-last": TracInLast(),
        },
        set(tokenizer.convert_ids_to_tokens(result.common_tokens.tolist())),  # of more than a tenth of the articles
    )
    console.print()
    console.print(flipped_table, comparison)

    if options.pictures:
        draw_terminals(result, flipped_table, options.pictures)
    saved = result.save(options.output / "result.safetensors")
    read = test[:100]
    page = (
        trainer.influence(asking(read), method=method, k=20, target="prediction")
        .with_texts(train=[text for text, _ in train], test=[text for text, _ in read])
        .to_html(options.output / "page.html", title=f"What taught the model the topics of {len(read)} articles?")
    )
    size = sum(file.stat().st_size for file in (options.output / "trace").rglob("*") if file.is_file())
    console.print(
        f"\nTrace: {options.output / 'trace'} ({size / 1e6:.0f} MB). Result: {saved}. "
        f"A page to read: {page}. "
        f"{fitted - started:.0f} s to fit and cache, {time.monotonic() - fitted:.0f} s for all answers."
    )
    top_tenth = {
        each: len(flipped & set(values.topk(len(train) // 10).indices.tolist())) / max(len(flipped), 1)
        for each, values in scores.items()
    }
    return {"accuracy": accuracy, "found_in_top_tenth": top_tenth, "chosen": chosen}


if __name__ == "__main__":
    main()
