"""The documentation's Python runs as it stands, page by page, and says where each of its names comes from."""

from __future__ import annotations

import builtins
import csv
import os
import symtable
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch
import torch_files
import toy
import trainer_runs
from fences import PAGES, blocks, page_text, prose
from pytorch_lightning.callbacks import ModelCheckpoint
from spelled_fits import TEST, TRAIN, Spelled
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from toy import Toy, fitted, loader, quiet
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from twin_toy import TwinToy

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInLayer, TracInMixin

NAMES = ["tech", "business", "sport"]
# Each page with Python is run by the test here that bears its name, or:
ELSEWHERE = {
    "README.md": "test_readme.py, on a model and data of its own",
    "docs/start.md": "test_site.py: it is the README's script",
    "docs/command_line.md": "test_commands.py: it is the main.py of the commands there",
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def page(request):
    """The Python blocks of the page that a test is named after; when it ends it has taken all of them."""
    left = iter(blocks(f"docs/{request.node.name.removeprefix('test_')}.md", "python"))
    yield left
    assert [*map(str, left)] == []


@pytest.mark.parametrize("page_name", PAGES)
def test_every_block_has_a_test(page_name):
    found = blocks(page_name)
    assert 2 * len(found) == page_text(page_name).count("```")
    languages = {block.language for block in found}
    assert languages <= {"python", "bash", "yaml", "text"}  # text is what something prints; test_commands.py has bash
    if "python" in languages:
        assert (f"test_{Path(page_name).stem}" in globals()) != (page_name in ELSEWHERE)
    if "yaml" in languages:
        assert page_name == "docs/command_line.md"


def free_names(block) -> set[str]:
    """Names that a block uses and does not make."""
    used, made = set(), set()
    tables = [symtable.symtable(block.text, str(block), "exec")]
    for table in tables:
        tables.extend(table.get_children())
        for name in table.get_symbols():
            if table.get_type() == "module" and (name.is_assigned() or name.is_imported()):
                made.add(name.get_name())
            elif name.is_global() or table.get_type() == "module":
                used.add(name.get_name())
    return used - made - set(dir(builtins))


@pytest.mark.parametrize("page_name", [page for page in PAGES if blocks(page, "python")])
def test_a_page_says_where_each_name_comes_from(page_name):
    """Imported, made above, or named in what people read."""
    made: set[str] = set()
    for block in blocks(page_name, "python"):
        assert {name for name in free_names(block) - made if f"`{name}`" not in prose(page_name)} == set()
        made |= {name.get_name() for name in symtable.symtable(block.text, str(block), "exec").get_symbols()}


class News(Spelled):
    """A classifier of batches by name, whose classes have names."""

    def influence_loss(self, batch):
        return super().influence_loss((batch["input_ids"], batch["labels"]))

    def influence_label_names(self):
        return dict(enumerate(NAMES))

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


TOKENIZER = News().tokenizer
collate = partial(TOKENIZER.pad, return_tensors="pt")


def items(texts) -> list[dict]:
    return [{**TOKENIZER(text, return_token_type_ids=False), "labels": at % 3} for at, text in enumerate(texts)]


def batches(texts, **options) -> DataLoader:
    return DataLoader(items(texts), batch_size=4, collate_fn=collate, **options)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return batches(TRAIN, shuffle=True)

    def test_dataloader(self):
        return batches(TEST)


class Bare(pl.LightningModule):
    """A classifier of token ids that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(toy.VOCABULARY, 8, padding_idx=0)
        self.head = nn.Linear(8, toy.CLASSES)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class OfHuggingFace(pl.LightningModule):
    """A module around a model of Hugging Face."""

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Bert(OfHuggingFace):
    """A tiny model of Hugging Face, in a module that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(TOKENIZER), num_labels=len(NAMES), **sizes)
        self.model = BertForSequenceClassification(config).train()


class Layered(News):
    """Reads texts by a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv1d(8, 8, 3, padding=1)])
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, ids):
        return self.head(self.encoder(self.convolutions[0](self.embedding(ids).mT).mean(2)))


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What the blocks of a page take for known, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)
    return {
        "model": News(),
        "train_loader": batches(TRAIN, shuffle=True),
        "val_loader": batches(TEST),
        "test_loader": batches(TEST),
        "train_texts": TRAIN,
        "test_texts": TEST,
    }


@pytest.fixture
def known(given):
    """The same after a fit."""
    trainer = quiet(max_epochs=2, callbacks=[TracInCallback("trace")])
    trainer.fit(given["model"], given["train_loader"])
    return given | {"trainer": trainer}


def run(page: Iterator, known: dict) -> None:
    """Run what is left of a page."""
    for block in page:
        block.run(known)


def test_index(page, given):
    run(page, given | {"YourModule": Bert})


def test_targets(page, known):
    known["texts_from_production"] = TEST
    next(page).run(known)
    assert known["result"].target == "tech, not business"
    assert known["result"].target_classes == [0, 1]
    trainer = quiet(max_epochs=1, callbacks=[TracInCallback("of-tokens")])
    trainer.fit(Writer(), tokens(4))
    next(page).run({"trainer": trainer, "test_loader": tokens(2)})
    next(page).run(known)
    assert known["influence_with_labels"](None, (1, 2, 3), 4) == (1, 4, 3)


class Writer(TracInMixin, OfHuggingFace):
    """A language model, and as much of a tokenizer as the names of two tokens take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=1))
        self.tokenizer = SimpleNamespace(
            encode=lambda text, **_: [[" Paris", " London"].index(text)],
            convert_ids_to_tokens=lambda ids: [str(token) for token in ids],
        )


def tokens(n: int) -> DataLoader:
    ids = torch.randint(20, (n, 14), generator=torch.Generator().manual_seed(n))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)


def test_methods(page, known, tmp_path, monkeypatch):
    labels = torch.tensor([each["labels"] for each in items(TRAIN)])
    known |= {"trusted_loader": batches(TEST), "train_data": items(TRAIN), "labels": labels}
    next(page).run(known)
    next(page).run(known)
    assert known["again"].method == known["result"].method
    assert torch.equal(known["again"].scores, known["result"].scores)
    next(page).run(known)
    next(page).run(known)
    of_layers = quiet(max_epochs=1, callbacks=[TracInCallback("of-layers", methods=("encoder.0",))])
    of_layers.fit(Layered(), known["train_loader"])
    assert of_layers.influence(known["test_loader"], method=known["method"]).scores.std() > 0
    next(page).run(known)
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    of_convolutions = quiet(max_epochs=1, callbacks=[known["callback"]])
    of_convolutions.fit(Layered(), known["train_loader"])
    method = TracInLayer("convolutions.0", precondition="kfac")
    assert of_convolutions.influence(known["test_loader"], method=method).scores.std() > 0
    monkeypatch.chdir(tmp_path)
    of_all_layers = known | {"model": Bert()}
    next(page).run(of_all_layers)
    next(page).run(of_all_layers)
    assert of_all_layers["kernel"].mix[0] == 0.5
    assert len(of_all_layers["kernel"].parts) > 5
    assert of_all_layers["result"].scores.std() > 0
    next(page).run(known)
    assert known["weights"].shape == (len(TRAIN),)
    assert [float(known["weights"][labels == label].min()) for label in range(3)] == [0, 0, 0]


def test_modules(page, given):
    given["YourModule"] = Bare
    next(page).run(given)
    own, plain = given["Classifier"](), Bare()
    own.load_state_dict(plain.state_dict())
    own, plain = (fitted(str(at), each).influence(loader(toy.test_texts())) for at, each in enumerate((own, plain)))
    torch.testing.assert_close(own.scores, plain.scores)
    next(page).run(given)
    twin = quiet(given["Trainer"], callbacks=[TracInCallback("twin")])
    twin.fit(TwinToy(), loader())
    assert twin.influence(loader(toy.test_texts())).scores.shape == (toy.N_TEST, toy.N_TRAIN)


def test_processes(page, given):
    """With one process in the place of sixteen on two nodes; tests/parallel has several."""
    (block,) = page
    text = block.text.replace("devices=8, num_nodes=2", "devices=1").replace("/shared/trace", "trace")
    given["news"] = Data()
    with patch.dict(os.environ):
        try:
            replace(block, text=text).run(given)
        finally:
            torch.distributed.destroy_process_group()
    assert given["result"].scores.shape == (len(TEST), len(TRAIN))


def test_recording(page, given):
    run(page, given | {"model": Bert()})


def test_validation(page, given):
    run(page, given)
    assert [*Path().rglob("influential.html")]


def test_words(page, known, capsys):
    run(page, known)
    assert [*Path().rglob("influential.html")]
    assert "Test example 0" in capsys.readouterr().out


def test_results(page, known, capsys, monkeypatch):
    """Without the hub of Hugging Face, and without Spotlight, which are not here."""
    datasets = pytest.importorskip("datasets")
    pushed, shown = [], []
    spotlight = SimpleNamespace(show=shown.append)
    monkeypatch.setitem(sys.modules, "renumics", module := ModuleType("renumics"))
    monkeypatch.setattr(module, "spotlight", spotlight, raising=False)
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name: pushed.append(name))
    run(page, known)
    result = known["trainer"].influence(known["test_loader"])
    assert str(result.with_texts(TRAIN, TEST)) in capsys.readouterr().out
    assert pushed == ["me/influence"]
    assert shown[0].column_names == list(result.rows()[0])
    assert all(Path(name).exists() for name in ("page.html", "label_issues.csv", "pairs.parquet"))


def test_test_examples(page, known, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache"))
    Path("new.csv").write_text("text,label\nthe cup match,2\n", encoding="utf-8")
    known |= {"news": Data(), "other_news": Data(), "sms_texts": TEST}
    known |= {"bbc_loader": batches(TEST), "sms_loader": batches(TEST)}
    known["trainer"] = quiet(max_epochs=1, callbacks=[TracInCallback("another")])
    run(page, known)
    assert known["result"].test_loader_names == ("bbc", "sms")


def test_label_review(page, known):
    known |= {"train_data": items(TRAIN), "names": NAMES, "collate": collate}
    known["trainer"] = quiet(max_epochs=1, callbacks=[TracInCallback("another", overwrite=True)])
    next(page).run(known)
    with Path("label_issues.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[0]["corrected_label"], rows[1]["corrected_label"] = "sport", "drop"
    with Path("label_issues.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    known["trainer"] = quiet(max_epochs=1)
    next(page).run(known)
    assert len(known["corrected"]) == len(TRAIN) - 1
    assert {"labels": 2}.items() <= known["corrected"][int(rows[0]["train_index"]) - 1].items()


def test_own_data(page, known, capsys):
    packed = Path(sys.prefix) / "data" / "vaderSentiment-3.3.2.tar.gz"  # from what the page downloads
    with tarfile.open(packed) as package:
        inner = package.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as resources:
            resources.extract("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", filter="data")
    next(page).run({})
    with Path("messages.csv").open(newline="", encoding="utf-8") as file:
        found = Counter(row["label"] for row in csv.DictReader(file))
    assert f"{found.total():,} different sentences, {found['positive']:,} of them positive" in page_text(
        "docs/own_data.md"
    )
    known |= {"method": TracInLast(), "train": [{"text": text} for text in TRAIN]}
    next(page).run(known | {"result": known["trainer"].influence(known["test_loader"])})
    assert "target prediction" in capsys.readouterr().out
    assert all(Path(name).exists() for name in ("review.csv", "result.safetensors"))
    with Path("messages.csv").open("w", newline="", encoding="utf-8") as file:  # few, to be quick
        csv.writer(file).writerows([("text", "label"), *((text, NAMES[at % 3]) for at, text in enumerate(TRAIN * 4))])
    next(page).run(known)
    assert known["result"].n_train == len(known["train"])
    assert "<unk>" not in str(known["result"].word_table())
    assert Path("page-of-bag.html").exists()


def test_metrics(page, capsys):
    """What the page prints stands beside it."""
    known = {}
    run(page, known)
    found = blocks("docs/metrics.md", "python")
    lines = [line for block in found for line in block.text.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == [line.partition("#")[2].strip() for line in lines]
    assert len(lines) == 5
    assert f"`within.reliability`, {known['within'].reliability:.2f} here" in page_text("docs/metrics.md")
    scores, labels = torch.randn(4, 200), torch.zeros(4, dtype=torch.long)
    trainer = quiet()
    trainer.test(known["Judged"](), DataLoader([*zip(scores, labels, strict=True)], batch_size=2), verbose=False)
    assert 0 <= trainer.callback_metrics["same class"] <= 1


def test_retraining(page, known, capsys):
    known |= {"News": News, "train_data": items(TRAIN), "collate": collate}
    run(page, known)
    printed = capsys.readouterr().out
    assert "Test example 0: removing its 2 proponents" in printed
    assert "To explain: fall of the target's probability without the 2 strongest proponents" in printed
    assert "To weigh: LDS: rank correlation of summed scores with 8 retrainings on halves" in printed
    assert known["found"].losses.shape == (8, 2, 3)


@torch_files.are_read
def test_past_runs(page, given):
    quiet(enable_checkpointing=True, callbacks=[ModelCheckpoint("runs", save_top_k=-1)]).fit(Toy(), loader())
    trainer_runs.trained("output")
    known = {
        "model": Toy(),
        "train_loader": loader(),
        "test_loader": loader(toy.test_texts()),
        "hf_model": trainer_runs.model(),
        "hf_train_loader": trainer_runs.batches(trainer_runs.N_TRAIN, 0),
        "hf_test_loader": trainer_runs.batches(trainer_runs.N_TEST, 1),
        "pool_loader": loader(toy.texts(9, seed=3)),
        "trace_of_run": fitted("trace-of-run").callbacks[0].trace,
    }
    next(page).run(known)
    Path("runs/epoch=1-step=10.ckpt").rename("runs/best.ckpt")
    run(page, known)
    assert Trace("trace").header.notes == Trace("trace-of-trainer").header.notes == ()
    assert known["result"].candidates
    assert len(known["chosen"]) == 2
