"""Why is the model so sure of something wrong, and does it change its mind without the examples that taught it?

Trains a small network on rated sentences of movie reviews and takes the test sentences that it is most sure of and
wrong about. Influence names the training sentences that taught it so, and the words. To check that, each mistake's
strongest proponents are removed and the network is trained again from the same start: does it still say so? As many
random sentences of the same label are removed for comparison. ``make sentiment`` runs it.

    python -m examples.sentiment                                              # offline
    python -m examples.sentiment --data rotten_tomatoes                       # names on the Hugging Face hub
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset
from transformers import AutoModel, AutoTokenizer

from examples.classifier import Tokenized, batches, be_quiet, predicted
from examples.data import hub_data, movie_reviews, packaged_minilm
from lightning_tracin import TracInCallback, TracInMixin, TracInWE, Trainer

console = Console()


class Network(TracInMixin, pl.LightningModule):
    """Pretrained word vectors, features of each pair of neighbouring words, and the largest of each feature.

    Args:
        vectors: (vocabulary, hidden) of all words; they stay as they are.
        names: of the labels.
        tokenizer: to print words with.
    """

    def __init__(self, vectors: Tensor, names: Sequence[str], tokenizer: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            vectors, padding_idx=tokenizer.pad_token_id
        )
        self.features = nn.Linear(2 * vectors.shape[1], 64)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, len(names))
        self.names = names
        self.tokenizer = tokenizer

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (B, n_labels), of token ids (B, T)."""
        words = self.embedding(ids)
        pairs = torch.cat([words[:, :-1], words[:, 1:]], dim=2)
        features = self.features(pairs).relu() * (ids[:, 1:, None] != self.tokenizer.pad_token_id)
        logits: Tensor = self.head(self.dropout(features.amax(1)))
        return logits

    def influence_label_names(self) -> dict[int, str]:
        """What to print for each label."""
        return dict(enumerate(self.names))

    def influence_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each example."""
        return functional.cross_entropy(self(batch["input_ids"]), batch["labels"], reduction="none")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Their mean."""
        return self.influence_loss(batch).mean()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The probability of each label."""
        return self(batch["input_ids"]).softmax(-1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fitted(
    data: Any, vectors: Tensor, names: Sequence[str], tokenizer: Any, options: argparse.Namespace, *callbacks: Any
) -> Trainer:
    """A trainer that has fitted a network to the data, each time from the same start."""
    pl.seed_everything(options.seed, verbose=False)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(vectors, names, tokenizer), batches(data, tokenizer, shuffle=True))
    return trainer


def word_vectors(name: str) -> Tensor:
    """The word embeddings of a pretrained transformer, at a scale that a new network learns well from."""
    vectors: Tensor = AutoModel.from_pretrained(name).get_input_embeddings().weight.detach()
    return vectors / (2 * vectors.std())


def sureness(texts: Sequence[str], sure: Tensor, changed: Sequence[int], n_removed: int) -> Table:
    """How sure the network is of each mistake, before and after it is trained again."""
    table = Table(title=f"How sure of its mistakes, trained on all and without {n_removed} sentences")
    table.add_column("mistake", no_wrap=True, max_width=34)
    for column in ("all", "no proponents", "no random ones"):
        table.add_column(column, justify="right", no_wrap=True)
    for text, row in zip(texts, sure.tolist(), strict=True):
        table.add_row(text, *(f"{each:.2f}" for each in row))
    table.add_section()
    table.add_row("mean", *(f"{each:.2f}" for each in sure.mean(0).tolist()), style="bold")
    table.add_row("predictions that changed", *(f"{each} of {len(sure)}" for each in changed), style="bold")
    return table


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose word vectors: a Hugging Face name or a folder (default: MiniLM-L6)")
    parser.add_argument("--data", help="a data set on the hub with text and label (default: movie reviews)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-size", type=int, default=4000)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--mistakes", type=int, default=8, help="how many confident mistakes are checked")
    parser.add_argument("--remove", type=float, default=0.05, help="share of the training set that is removed")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of each sentence")
    parser.add_argument("--output", type=Path, default=Path("demo_output/sentiment"), help="where trace and page go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a quick look, at other defaults")
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(train_size=1000, test_size=500, mistakes=4)
        options = parser.parse_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, explain, remove, train again; returns the figures that were printed."""
    options = parsed(arguments)
    be_quiet()
    started = time.monotonic()
    texts, names = hub_data(options.data) if options.data else movie_reviews()
    random.Random(options.seed).shuffle(texts)
    train, test = texts[: options.train_size], texts[-options.test_size :]
    model_name = options.model or packaged_minilm()
    tokenizer, vectors = AutoTokenizer.from_pretrained(model_name), word_vectors(model_name)
    train_set, test_set = (Tokenized(part, tokenizer, options.max_length) for part in (train, test))

    recorded = TracInCallback(options.output / "trace", methods=("tracin-we",), overwrite=True)
    trainer = fitted(train_set, vectors, names, tokenizer, options, recorded)
    probabilities = predicted(trainer, test_set, tokenizer)
    confidence, said = probabilities.max(1)
    is_wrong = said != torch.tensor([label for _, label in test])
    console.print(f"\nAccuracy on {len(test)} test sentences: [bold]{1 - is_wrong.float().mean():.3f}[/]")

    mistakes = confidence.masked_fill(~is_wrong, 0).topk(min(options.mistakes, int(is_wrong.sum()))).indices.tolist()
    asked = Tokenized([test[index] for index in mistakes], tokenizer, options.max_length)
    method = TracInWE(normalize="cosine", exclude_tokens="special")
    result = trainer.influence(batches(asked, tokenizer), method=method, target="prediction")
    result = result.with_texts([text for text, _ in train], [test[index][0] for index in mistakes])
    wrongly, rightly = (names[label] for label in (int(said[mistakes[0]]), test[mistakes[0]][1]))
    console.print(
        f"\nThe most confident mistake: {wrongly}, but people say {rightly}. What taught it to say {wrongly}?"
    )
    result.show(0, k=4, console=console)

    n_removed = round(options.remove * len(train))
    sure = torch.zeros(len(mistakes), 3)  # of each mistake: trained on all, without proponents, without random ones
    insists = torch.ones(len(mistakes), 3, dtype=torch.bool)
    for row, index in enumerate(mistakes):
        sure[row, 0] = confidence[index]
        alike = [number for number, (_, label) in enumerate(train) if label == int(said[index])]
        removals = [result.proponents(n_removed).indices[row].tolist(), random.Random(row).sample(alike, n_removed)]
        for column, removed in enumerate(map(set, removals), start=1):
            left = Subset(train_set, [number for number in range(len(train)) if number not in removed])
            retrained = fitted(left, vectors, names, tokenizer, options)
            again = predicted(retrained, asked, tokenizer)[row]
            sure[row, column] = again[said[index]]
            insists[row, column] = again.argmax() == said[index]
    changed = (~insists).sum(0).tolist()
    console.print()
    console.print(sureness([test[index][0] for index in mistakes], sure, changed, n_removed))

    page = result.to_html(options.output / "page.html", title="Confident mistakes on movie reviews")
    console.print(f"\nPage: {page}. {time.monotonic() - started:.0f} s in all.")
    return {"accuracy": 1 - is_wrong.float().mean().item(), "sure": sure.mean(0).tolist(), "changed": changed}


if __name__ == "__main__":
    main()
