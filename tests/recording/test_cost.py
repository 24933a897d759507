"""What a fit says that it will cost, against what lies on disk afterwards."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from toy import fitted

from lightning_tracin import Trace, TracInMixin

VOCABULARY, HIDDEN, N = 3000, 32, 160
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def long_tailed(n: int = N) -> list[dict]:
    """Texts of very different lengths, of words by Zipf's law."""
    generator = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, VOCABULARY)
    frequencies /= frequencies.sum()
    lengths = np.clip(generator.lognormal(3, 0.9, n), 3, 400).astype(int)
    drawn = [1 + generator.choice(VOCABULARY - 1, size=length, p=frequencies) for length in lengths]
    return [
        {"ids": ids.tolist(), "label": int(label)}
        for ids, label in zip(drawn, generator.integers(3, size=n), strict=True)
    ]


def collate(rows):
    ids = pad_sequence([torch.tensor(row["ids"]) for row in rows], batch_first=True)
    return ids, torch.tensor([row["label"] for row in rows])


def as_strings(rows):
    return [{"text": " ".join(f"w{token}" for token in row["ids"]), "label": row["label"]} for row in rows]


def collate_strings(rows):
    numbered = [{"ids": [int(word[1:]) for word in row["text"].split()], "label": row["label"]} for row in rows]
    return collate(numbered)


def padded(rows):
    """As tensors of one length, which tell nothing of texts' lengths."""
    ids, labels = collate(rows)
    return list(zip(ids, labels, strict=True))


class Reader(TracInMixin, pl.LightningModule):
    """A layer at every token, a mean, and a head."""

    def __init__(self, *, frozen: bool = False, optimizer=torch.optim.AdamW, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0).requires_grad_(not frozen)
        self.wide = nn.Linear(HIDDEN, 600).requires_grad_(not frozen)
        self.head = nn.Linear(600, 3)
        self.make = lambda parameters: optimizer(parameters, lr=1e-3, **options)

    def influence_loss(self, batch):
        ids, labels = batch
        present = (ids != 0).unsqueeze(-1)
        read = (torch.tanh(self.wide(self.embedding(ids))) * present).sum(1) / present.sum(1)
        return functional.cross_entropy(self.head(read), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return self.make([each for each in self.parameters() if each.requires_grad])


class Writer(TracInMixin, pl.LightningModule):
    """A language model whose head is tied to its words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def influence_loss(self, batch):
        ids, _ = batch
        logits = self.head(self.embedding(ids[:, :-1]).cumsum(1).tanh())
        losses = functional.cross_entropy(logits.mT, ids[:, 1:], ignore_index=0, reduction="none")
        return losses.sum(1) / (ids[:, 1:] != 0).sum(1)

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(rows=None, collate_fn=collate, **options) -> DataLoader:
    rows = long_tailed() if rows is None else rows
    return DataLoader(rows, batch_size=20, collate_fn=collate_fn, **{"shuffle": "sampler" not in options, **options})


def bytes_of(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * UNITS[unit]


def told(caplog) -> str:
    (line,) = [each.message for each in caplog.records if each.message.startswith("TracInCallback: ")]
    return line


def assert_right(line: str, path) -> None:
    """Compare a line's total with the bytes on disk."""
    files = [each for each in path.rglob("*.safetensors") if each.is_file()]
    assert bytes_of(re.findall(r"= ([\d.,]+ \w+)", line)[-1]) == pytest.approx(
        sum(each.stat().st_size for each in files), rel=0.2
    ), line


def assert_parts_right(line: str, path) -> None:
    """Compare what a line says of a checkpoint with the bytes on disk, part by part."""
    number, parts = re.search(r"(\d+) checkpoints? x \(([^)]*)\)", line).groups()
    checkpoints = Trace(path).checkpoints
    assert int(number) == len(checkpoints)
    found = {
        "weights": "weights.safetensors",
        "moments": "second-moments-*.safetensors",
        "gradients": "[wl]*/[0-9]*.safetensors",
        "components": "linear-*/components.safetensors",
        "texts": "texts/*.safetensors",
    }
    for part in parts.split(" + "):
        size, _, name = part.rpartition(" ")
        stored = [sum(file.stat().st_size for file in each.path.glob(found[name])) for each in checkpoints]
        assert bytes_of(size) == pytest.approx(np.mean(stored), rel=0.2), (part, stored)


def fit(path, caplog, module=None, data=None, **options):
    with caplog.at_level(logging.INFO):
        fitted(path, module or Reader(), loader() if data is None else data, **{"dtype": "float16", **options})
    return told(caplog)


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: loader(), id="lists"),
        pytest.param(lambda: loader(as_strings(long_tailed()), collate_strings), id="strings", marks=pytest.mark.slow),
        pytest.param(lambda: loader(padded(long_tailed()), None), id="padded"),
    ],
)
def test_the_size_of_a_trace_with_long_tailed_lengths(tmp_path, caplog, data, cache):
    """The few examples of the first batch differ in length on purpose: their mean is that of no training set."""
    line = fit(tmp_path / "trace", caplog, data=data(), cache=cache, methods=("tracin-we", "tracin-last", "wide"))
    assert_parts_right(line, tmp_path / "trace")
    if cache == "on_demand":
        assert "the first query adds 2 checkpoints x (" in line
    else:
        assert_right(line, tmp_path / "trace")
        assert "texts" in line


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "int8"},
        {"top_words": 10},
        {"projection": 8},
        {"projection": (4, 6), "methods": ("tracin-we", "wide")},
        {"rank": (16, 8), "methods": ("tracin-we", "wide")},
        {"methods": ("tracin-last",)},
        {"keep_weights": False},
    ],
    ids=str,
)
def test_the_size_with_what_saves_space(tmp_path, caplog, options):
    line = fit(tmp_path / "trace", caplog, **options)
    assert_parts_right(line, tmp_path / "trace")
    assert_right(line, tmp_path / "trace")


@pytest.mark.parametrize(
    ("module", "moments"),
    [
        (lambda: Reader(optimizer=torch.optim.SGD), False),
        (lambda: Reader(optimizer=torch.optim.Adam, weight_decay=0.1), True),  # which moves every word
        (lambda: Reader(optimizer=torch.optim.AdamW, weight_decay=0.1), True),
        (lambda: Reader(optimizer=torch.optim.Adamax), False),
        (lambda: Reader(optimizer=torch.optim.RAdam), True),
    ],
    ids=["sgd", "adam-l2", "adamw", "adamax", "radam"],
)
def test_moments_are_those_of_the_optimizer(tmp_path, caplog, module, moments):
    line = fit(tmp_path / "trace", caplog, module(), cache="on_demand")
    assert ("B moments" in line) is moments
    assert_parts_right(line, tmp_path / "trace")


def test_tied_weights_count_once_and_their_moments_whole(tmp_path, caplog):
    line = fit(tmp_path / "trace", caplog, Writer(), loader(long_tailed(40)), methods=("tracin-we",))
    assert_parts_right(line, tmp_path / "trace")
    assert_right(line, tmp_path / "trace")


def test_frozen_weights_count_once_for_all_checkpoints(tmp_path, caplog):
    line = fit(tmp_path / "trace", caplog, Reader(frozen=True), methods=("tracin-last",))
    assert "kB frozen weights" in line
    assert_parts_right(line, tmp_path / "trace")
    assert_right(line, tmp_path / "trace")


@pytest.mark.parametrize(
    ("sampler", "options", "trainer", "n_checkpoints"),
    [
        (lambda rows: SubsetRandomSampler(range(0, N, 2)), {}, {"max_epochs": 3}, 3),
        (lambda rows: SubsetRandomSampler(range(0, N, 2)), {"every_n_epochs": 3}, {"max_epochs": 6}, 2),
        (lambda rows: RandomSampler(rows, num_samples=100), {"every_n_epochs": 2}, {"max_epochs": 4}, 2),
        (lambda rows: WeightedRandomSampler(torch.ones(N), N), {}, {"max_epochs": 2}, 2),
        (RandomSampler, {}, {"max_epochs": 2, "limit_train_batches": 5}, 2),
        (RandomSampler, {"every_n_train_steps": 4}, {"max_epochs": -1, "max_steps": 10}, 2),
        (RandomSampler, {"every_n_train_steps": 3}, {"max_epochs": 2, "accumulate_grad_batches": 2}, 2),
        (RandomSampler, {"every_n_epochs": 2}, {"max_epochs": 5}, 2),
    ],
)
def test_what_is_drawn_and_how_often(tmp_path, caplog, sampler, options, trainer, n_checkpoints):
    rows = long_tailed()
    data = loader(rows, sampler=sampler(rows))
    line = fit(tmp_path / "trace", caplog, data=data, trainer=trainer, **options)
    assert f" {n_checkpoints} checkpoints x (" in line
    assert_right(line, tmp_path / "trace")


def test_training_stores_texts_at_each_checkpoint(tmp_path, caplog):
    options = {"cache": "training", "every_n_train_steps": 3}
    line = fit(tmp_path / "trace", caplog, trainer={"max_epochs": 1}, **options)
    assert " 2 checkpoints x (" in line
    assert_parts_right(line, tmp_path / "trace")
    assert_right(line, tmp_path / "trace")


def test_a_fit_without_an_end_is_told_by_checkpoint(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fitted(tmp_path / "trace", Reader(), loader(), trainer={"max_epochs": -1, "max_time": {"seconds": 1}})
    assert re.search(r"TracInCallback: for each checkpoint [\d.]+ \w+ weights \+ .* = ", told(caplog))


@pytest.mark.parametrize(
    ("options", "frozen", "expected"),
    [
        ({}, False, "a pass over the training set at each takes about half an epoch"),
        ({"methods": ("tracin-last",)}, False, "takes about a quarter of an epoch"),
        ({"cache": "training"}, False, "gradients come from training's own backward passes"),
        (
            {"every_n_train_steps": 2},
            False,
            "over what was drawn since the last, takes about half as long as training on it",
        ),
        ({}, True, "takes about an epoch"),
    ],
)
def test_the_time_of_a_pass(tmp_path, caplog, options, frozen, expected):
    assert expected in fit(
        tmp_path / "trace", caplog, Reader(frozen=frozen), loader(long_tailed(60)), trainer={"max_epochs": 1}, **options
    )
