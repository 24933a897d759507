"""``lightning-tracin estimate`` against traces that were recorded, and against fits' own first lines."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from toy import fitted, loader, quiet, texts
from transformers import BertConfig, BertForSequenceClassification, GPT2Config

from lightning_tracin import Trace, TracInCallback, TracInMixin
from lightning_tracin.cli.command import main

COSTS = Path(__file__).parents[2] / "docs/costs.md"
N, TOKENS, VOCABULARY, HIDDEN = 200, 12, 2000, 32


def asked(capsys, *arguments) -> dict:
    assert main(["estimate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def files_below(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))


class Bag(TracInMixin, pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.inner = nn.Linear(HIDDEN, 300)
        self.head = nn.Linear(HIDDEN, 3)

    def influence_loss(self, batch):
        ids, labels = batch
        read = self.embedding(ids)
        read = read + self.inner(read).tanh()[..., :HIDDEN]
        return functional.cross_entropy(self.head(read.mean(1)), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bert() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        architectures=["BertForSequenceClassification"],
    )


class Classifier(TracInMixin, pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = BertForSequenceClassification(bert())

    def forward(self, batch):
        return self.model(input_ids=batch[0], labels=batch[1])

    def training_step(self, batch, batch_idx):
        return self(batch).loss

    def influence_loss(self, batch):
        return functional.cross_entropy(self.model(input_ids=batch[0]).logits, batch[1], reduction="none")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rows() -> list[tuple[torch.Tensor, int]]:
    """Texts of 12 words by Zipf's law."""
    frequencies = 1 / torch.arange(1, VOCABULARY + 1)
    drawn = torch.multinomial(frequencies.expand(N, -1), TOKENS, True, generator=torch.Generator().manual_seed(0))
    return [(ids, number % 2) for number, ids in enumerate(drawn)]


def recorded(path: Path, module, epochs: int = 2, data=None, **options) -> Path:
    pl.seed_everything(0, verbose=False)
    callback = TracInCallback(path, on_error="raise", **options)
    loader = DataLoader(rows() if data is None else data, batch_size=20, shuffle=True)
    quiet(max_epochs=epochs, callbacks=[callback]).fit(module, loader)
    return path


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, ""),
        ({"dtype": "int8", "top_words": 5}, "--dtype int8 --top-words 5"),
        ({"projection": 8}, "--projection 8"),
        ({"keep_weights": False, "dtype": "float32"}, "--no-weights --dtype float32"),
        ({"methods": ("inner",), "projection": (4, 6)}, "--methods 300x32 --projection 4 6"),
        ({"methods": ("tracin-we", "inner")}, "--methods tracin-we 300x32"),
        ({"methods": ("inner",), "rank": (16, 8)}, "--methods 300x32 --rank 16 8"),
    ],
    ids=str,
)
def test_numbers_alone_tell_the_size_of_a_trace(tmp_path, capsys, options, arguments):
    module = Bag()
    path = recorded(tmp_path / "trace", module, **options)
    size = sum(each.numel() for each in module.parameters())
    numbers = f"--examples {N} --tokens {TOKENS} --hidden {HIDDEN} --vocab {VOCABULARY} --classes 3 --checkpoints 2"
    told = asked(capsys, *f"{numbers} --parameters {size} {arguments}".split())
    assert told["total"] == pytest.approx(files_below(path), rel=0.2)
    assert sum(told["checkpoint"]["gradients"].values()) + told["checkpoint"]["components"] == pytest.approx(
        files_below(*(Trace(path).checkpoints[0].path / site.key for site in Trace(path).sites)), rel=0.2
    )


def test_a_configuration_tells_the_size_of_a_trace(tmp_path, capsys):
    path = recorded(tmp_path / "trace", Classifier(), epochs=1)
    bert().save_pretrained(tmp_path / "model")
    told = asked(capsys, "--examples", N, "--model", tmp_path / "model", "--tokens", TOKENS)
    assert told["total"] == pytest.approx(files_below(path), rel=0.2)
    assert told["checkpoint"]["weights"] == pytest.approx(
        (Trace(path).checkpoints[0].path / "weights.safetensors").stat().st_size, rel=0.02
    )


def test_a_head_of_a_language_model_is_tied_and_called_at_every_token(tmp_path, capsys):
    config = GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    arguments = ["--examples", 100, "--model", tmp_path, "--tokens", 10]
    told = asked(capsys, *arguments)
    assert told["example"]["tracin-last"] == 10 * (12 + 2 * (500 + 16))
    words_alone = asked(capsys, *arguments, "--methods", "tracin-we")
    assert words_alone["checkpoint"]["moments"] == 500 * (4 * 16 + 8)  # the head has gradients of every row
    classifier = asked(capsys, *arguments, "--task", "sequence-classification", "--classes", 7)
    assert classifier["example"]["tracin-last"] == 12 + 2 * (7 + 16)


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_a_trace_tells_the_size_of_a_larger_one(tmp_path, capsys, cache):
    data = texts(400, length=30)
    small = recorded(tmp_path / "small", Bag(), epochs=1, data=[data[i] for i in range(0, 400, 4)], cache=cache)
    large = recorded(tmp_path / "large", Bag(), epochs=3, data=data, cache=cache)
    told = asked(capsys, "--trace", small, "--examples", 400, "--checkpoints", 3)
    assert told["total"] == pytest.approx(files_below(large), rel=0.2)
    assert asked(capsys, "--trace", large)["total"] == pytest.approx(files_below(large), rel=0.02)


@pytest.mark.parametrize(("cache", "are_stored_once"), [("checkpoint", True), ("training", False)])
def test_texts_of_several_checkpoints_in_an_epoch_are_counted_as_often_as_they_are_stored(
    tmp_path, capsys, cache, are_stored_once
):
    """A pass stores those that none before it has; training's own gradients come with theirs each time."""
    fitted(tmp_path / "trace", data=loader(texts(100), shuffle=True), every_n_train_steps=7, cache=cache)
    told = asked(capsys, "--trace", tmp_path / "trace")
    number, each, once = told["checkpoints"], told["checkpoint"]["texts"], told["once"]["texts"]
    assert number == 7
    assert (each == 0, once > 0) == (are_stored_once, are_stored_once)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "trace").rglob("texts/*.safetensors"))
    assert once + number * each == pytest.approx(on_disk, abs=number)
    more = asked(capsys, "--trace", tmp_path / "trace", "--checkpoints", 70)
    assert more["once"]["texts"] + 70 * more["checkpoint"]["texts"] == pytest.approx(
        on_disk * (1 if are_stored_once else 10), abs=70
    )
    assert main(["estimate", "--trace", str(tmp_path / "trace")]) == 0
    (row,) = re.findall(r"^texts {2,}(.+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(row.split("  ")) >= (2 if are_stored_once else 3)


def test_it_prints_a_table_and_the_line_of_a_fit(capsys):
    arguments = "--examples 200k --hidden 768 --vocab 30522 --parameters 110M --trainable 1M --checkpoints 3"
    assert main(["estimate", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^frozen weights +436\.0 MB$", printed, re.MULTILINE)
    line = " ".join(printed.split())  # it is wrapped at the terminal's width
    assert re.search(r" 3 checkpoints x \(4\.0 MB weights \+ .* frozen weights \+ .* texts = ", line)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--hidden 8 --vocab 9 --parameters 10", 2, "--examples is needed"),
        ("--examples 5 --hidden 8", 2, "--parameters, --vocab needed, or --model FOLDER"),
        ("--examples 0", 2, "expected a number from 1 on, such as 200k or 1.2B, but got '0'"),
        ("--examples 5 --model nowhere", 1, "nowhere holds no config.json"),
        ("--trace nowhere", 1, "no trace in"),
        ("--trace nowhere --dtype int8 --no-weights", 2, "--no-weights, --dtype would change nothing beside --trace"),
        ("--examples 5 --model nowhere --hidden 8", 2, "--hidden would change nothing beside --model"),
        (
            "--examples 5 --hidden 8 --vocab 9 --parameters 10 --task causal-lm",
            2,
            "--model FOLDER does, which is missing",
        ),
        (
            "--examples 5 --hidden 8 --vocab 9 --parameters 10 --labelled 3",
            2,
            "--labelled would change nothing: the last layer has 2 outputs, once for each example",
        ),
        (
            "--examples 5 --hidden 8 --vocab 9 --parameters 10 --language-model --classes 3",
            2,
            "--classes would change nothing: the last layer has 9 outputs, once for each token",
        ),
        ("--examples 5 --hidden 8 --vocab 9 --parameters 10 --projection 8", 2, "saves nothing"),
        ("--examples 5 --hidden 8 --vocab 9 --parameters 10 --methods pooler", 1, "but got 'pooler'"),
        ("--examples 5 --hidden 8 --vocab 9 --parameters 10 --projection 1 2 3", 2, "one number, or two"),
        ("--examples 5 --hidden 8 --vocab 9 --parameters 10 --projection 1 2 --rank 8 8", 2, "use one of them"),
    ],
)
def test_what_cannot_be_told_is_said(capsys, arguments, code, message):
    with pytest.raises(SystemExit, match=str(code)):  # of a wrong command line; else it is returned
        raise SystemExit(main(["estimate", *arguments.split()]))
    assert message in capsys.readouterr().err


def test_the_table_of_the_documentation_is_what_the_command_prints(capsys):
    found = re.findall(r"^\| .* \| `(lightning-tracin estimate [^`]+)` \|(.*)\|$", COSTS.read_text(), re.MULTILINE)
    assert len(found) >= 3
    for command, cells in found:
        for examples, cell in zip(("10k", "200k", "2M"), cells.split("|"), strict=True):
            assert main([*shlex.split(command)[1:], "--examples", examples]) == 0
            assert capsys.readouterr().out.strip().rpartition(" = ")[2] == cell.strip()
