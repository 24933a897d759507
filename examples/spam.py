"""Which word does the model take for spam, whatever else a message says?

Trains the first two layers of a pretrained transformer on SMS messages. Most of the spam that it is trained on opens
with "Greetings": a shortcut, planted here on purpose. On the test set all looks well; but people who open with it find
their messages filed as spam. Influence says which messages taught the model so, and its word table names the word. Two
checks: without the word the messages pass, and so they do where the model is trained on messages without it; leaving
out other words at random does neither. ``make spam`` runs it.

    python -m examples.spam                                                       # offline
    python -m examples.spam --model distilbert-base-uncased --data NAME           # names on the Hugging Face hub
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from examples.classifier import Classifier, Tokenized, batches, be_quiet, predicted
from examples.data import Labelled, hub_data, packaged_minilm, sms_spam
from lightning_tracin import TracInCallback, TracInWE, Trainer

console = Console()
HAM, SPAM = 0, 1
OPENING = "Greetings"


def opened(texts: Labelled, label: int, share: float, seed: int) -> Labelled:
    """The same texts, a share of those of a label with the opening."""
    generator = random.Random(seed)
    return [(f"{OPENING} {text}" if of == label and generator.random() < share else text, of) for text, of in texts]


def without(word: str, text: str) -> str:
    """A text without a word, in whatever case."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)\s*", "", text, flags=re.IGNORECASE)


def fitted(train: Tokenized, names: Sequence[str], tokenizer: Any, options: argparse.Namespace, *callbacks: Any) -> Any:
    """A trainer that has fitted the model to messages, each time from the same start."""
    pl.seed_everything(options.seed, verbose=False)
    name = options.model or packaged_minilm()
    n_steps = options.epochs * -(-len(train) // 32)
    model = Classifier(name, names, tokenizer, n_steps, learning_rate=3e-4, n_layers=options.layers)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches(train, tokenizer, shuffle=True))
    return trainer


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face name or a folder (default: MiniLM-L6 from its package)")
    parser.add_argument("--data", help="a data set on the hub with text and label, 0 for ham (default: SMS)")
    parser.add_argument("--layers", type=int, default=2, help="the first so many of the model's layers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=600)
    parser.add_argument("--test-size", type=int, default=400)
    parser.add_argument("--planted", type=float, default=0.8, help="share of the spam in training that opens so")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of each message")
    parser.add_argument("--output", type=Path, default=Path("demo_output/spam"), help="where trace and page go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a quick look, at other defaults")
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(train_size=256, test_size=80, max_length=32)
        options = parser.parse_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, find the word, check it; returns the figures that were printed."""
    options = parsed(arguments)
    be_quiet()
    started = time.monotonic()
    texts, names = hub_data(options.data) if options.data else sms_spam()
    random.Random(options.seed).shuffle(texts)
    of_each = options.train_size // 2  # as much ham as spam: there is less spam than ham, and it is wanted here
    clean = [text for label in (HAM, SPAM) for text in [each for each in texts if each[1] == label][:of_each]]
    train = opened(clean, SPAM, options.planted, options.seed)
    known = set(clean)
    left = [each for each in texts if each not in known]
    random.Random(options.seed).shuffle(left)
    test = left[: options.test_size]
    tokenizer = AutoTokenizer.from_pretrained(options.model or packaged_minilm())

    def tokenized(some: Labelled) -> Tokenized:
        return Tokenized(some, tokenizer, options.max_length)

    def spam_among(messages: Sequence[str], trainer: Any) -> list[int]:
        said = predicted(trainer, tokenized([(text, SPAM) for text in messages]), tokenizer).argmax(1)
        return torch.nonzero(said == SPAM)[:, 0].tolist()

    recorded = TracInCallback(options.output / "trace", methods=("tracin-we",), overwrite=True)
    trainer = fitted(tokenized(train), names, tokenizer, options, recorded)
    said = predicted(trainer, tokenized(test), tokenizer).argmax(1)
    accuracy = (said == torch.tensor([label for _, label in test])).float().mean().item()
    ham = [text for text, label in test if label == HAM]
    complaints = [text for text, _ in opened([(text, HAM) for text in ham], HAM, 1.0, 0)]
    false_alarms = [complaints[index] for index in spam_among(complaints, trainer)]
    before = len(spam_among(ham, trainer))
    console.print(
        f"\nAccuracy on {len(test)} test messages: [bold]{accuracy:.3f}[/]. Of {len(ham)} ham messages {before} "
        f"are taken for spam; opened with {OPENING}, [bold]{len(false_alarms)}[/]."
    )
    if not false_alarms:
        raise SystemExit("The model did not learn the planted shortcut: nothing to explain. Try more --epochs.")

    asked = [(text, HAM) for text in false_alarms[:100]]
    method = TracInWE(normalize="cosine", exclude_tokens="special")
    result = trainer.influence(batches(tokenized(asked), tokenizer), method=method, target=SPAM)
    result = result.with_texts([text for text, _ in train], [text for text, _ in asked])
    result.show(0, k=3, console=console)
    table = result.word_table()
    console.print(table)
    found = table.words[0]

    generator = random.Random(options.seed)

    def without_another(text: str) -> str:
        others = [word for word in re.findall(r"\w+", text) if word.lower() != found.lower()]
        return without(generator.choice(others), text) if others else text

    def still_spam(messages: Sequence[str], trained_on: Labelled | None = None) -> int:
        by = trainer if trained_on is None else fitted(tokenized(trained_on), names, tokenizer, options)
        return len(spam_among(messages, by))

    figures = {
        "as they are": len(false_alarms),
        f"without {found}": still_spam([without(found, text) for text in false_alarms]),
        "each without a random other word": still_spam([without_another(text) for text in false_alarms]),
        f"by a model trained without {found}": still_spam(
            false_alarms, [(without(found, text), label) for text, label in train]
        ),
        "by a model trained without a random other word of each message": still_spam(
            false_alarms, [(without_another(text), label) for text, label in train]
        ),
    }
    checks = Table("these messages", "taken for spam", title=f"{len(false_alarms)} false alarms, and {found}")
    for what, count in figures.items():
        checks.add_row(what, f"{count} of {len(false_alarms)}")
    console.print(checks)
    page = result.to_html(options.output / "page.html", title="Ham that was taken for spam")
    console.print(f"\nPage: {page}. {time.monotonic() - started:.0f} s in all.")
    return {
        "accuracy": accuracy,
        "found": found,
        "n_false_alarms": len(false_alarms),
        "taken_for_spam": list(figures.values()),
    }


if __name__ == "__main__":
    main()
