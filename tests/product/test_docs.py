"""The examples of the documentation: those of its pages run as they stand, and none names what does not exist."""

from __future__ import annotations

import ast
import csv
import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from spelled_fits import TEST, TRAIN, Spelled
from torch.utils.data import DataLoader
from toy import quiet
from transformers import GPT2Config, GPT2LMHeadModel

import lightning_tracin
from lightning_tracin import InfluenceResult, TracInCallback, TracInMixin, Trainer
from lightning_tracin.report.label_issues import LabelIssues
from lightning_tracin.report.word_table import WordTable

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = ["tech", "business", "sport"]
# Of what the examples call their things, the types.
KNOWN = {"trainer": Trainer, "result": InfluenceResult, "issues": LabelIssues, "table": WordTable, "Trainer": Trainer}

pytestmark = pytest.mark.filterwarnings("ignore")


def blocks(page: str) -> list[str]:
    """The examples of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


class News(Spelled):
    """A classifier of batches by name, whose classes have names."""

    def influence_loss(self, batch):
        return super().influence_loss((batch["input_ids"], batch["labels"]))

    def influence_label_names(self):
        return dict(enumerate(NAMES))


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


@pytest.fixture
def known(tmp_path, monkeypatch):
    """What the examples of a page take for known, after a fit."""
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)
    trainer, model = quiet(max_epochs=2, callbacks=[TracInCallback("trace")]), News()
    trainer.fit(model, batches(TRAIN, shuffle=True))
    public = {name: getattr(lightning_tracin, name) for name in lightning_tracin.__all__}
    return public | {
        "DataLoader": DataLoader,
        "trainer": trainer,
        "model": model,
        "train_loader": batches(TRAIN, shuffle=True),
        "test_loader": batches(TEST),
        "train": [{"text": text} for text in TRAIN],
        "train_texts": TRAIN,
        "test_texts": TEST,
    }


def run(page: str, known: dict) -> None:
    for block in blocks(page):
        exec(block, known)


def test_targets(known):
    of_classes, of_tokens, of_modules = blocks("targets")
    known["texts_from_production"] = TEST
    exec(of_classes, known)
    assert known["result"].target == "tech, not business"
    exec(of_modules, known)
    assert known["influence_with_labels"](None, (1, 2, 3), 4) == (1, 4, 3)
    trainer = quiet(max_epochs=1, callbacks=[TracInCallback("of-tokens")])
    trainer.fit(Writer(), tokens(4))
    exec(of_tokens, {"trainer": trainer, "test_loader": tokens(2)})


class Writer(TracInMixin, pl.LightningModule):
    """A language model, and as much of a tokenizer as the names of two tokens take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=1))
        self.tokenizer = SimpleNamespace(
            encode=lambda text, **_: [[" Paris", " London"].index(text)],
            convert_ids_to_tokens=lambda ids: [str(token) for token in ids],
        )

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def tokens(n: int) -> DataLoader:
    ids = torch.randint(20, (n, 14), generator=torch.Generator().manual_seed(n))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)


def test_methods(known):
    labels = torch.tensor([each["labels"] for each in items(TRAIN)])
    known |= {"torch": torch, "trusted_loader": batches(TEST), "train_data": items(TRAIN), "labels": labels}
    run("methods", known)
    assert known["weights"].shape == (len(TRAIN),)
    assert [float(known["weights"][labels == label].min()) for label in range(3)] == [0, 0, 0]
    assert known["again"].method == known["result"].method
    assert torch.equal(known["again"].scores, known["result"].scores)


def test_words(known, capsys):
    run("words", known)
    assert "Test example 0" in capsys.readouterr().out


def test_results(known, capsys, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pushed, shown = [], []
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name: pushed.append(name))
    result = known["trainer"].influence(known["test_loader"])
    run("results", known | {"result": result, "spotlight": SimpleNamespace(show=shown.append)})
    assert str(result.with_texts(TRAIN, TEST)) in capsys.readouterr().out
    assert pushed == ["me/influence"]
    assert shown[0].column_names == list(result.rows()[0])
    assert all(Path(name).exists() for name in ("page.html", "label_issues.csv", "pairs.parquet"))


def test_test_examples(known, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache"))
    Path("new.csv").write_text("text,label\nthe cup match,2\n", encoding="utf-8")
    known |= {"datasets": datasets, "news": Data(), "other_news": Data(), "texts": TEST}
    known |= {"bbc_loader": batches(TEST), "sms_loader": batches(TEST)}
    known["trainer"] = quiet(max_epochs=1, callbacks=[TracInCallback("another")])
    run("test_examples", known)
    assert known["result"].test_loader_names == ("bbc", "sms")


def test_label_review(known):
    asking, correcting = blocks("label_review")
    known |= {"train_data": items(TRAIN), "names": NAMES, "collate": collate}
    known["trainer"] = quiet(max_epochs=1, callbacks=[TracInCallback("another", overwrite=True)])
    exec(asking, known)
    with Path("label_issues.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[0]["corrected_label"], rows[1]["corrected_label"] = "sport", "drop"
    with Path("label_issues.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    known["trainer"] = quiet(max_epochs=1)
    exec(correcting, known)
    assert len(known["corrected"]) == len(TRAIN) - 1
    assert {"labels": 2}.items() <= known["corrected"][int(rows[0]["train_index"]) - 1].items()


def test_own_data(known, capsys):
    _, asking, of_a_bag = blocks("own_data")
    known |= {"method": lightning_tracin.TracInLast(), "train": [{"text": text} for text in TRAIN]}
    exec(asking, known | {"result": known["trainer"].influence(known["test_loader"])})
    assert "target prediction" in capsys.readouterr().out
    assert all(Path(name).exists() for name in ("review.csv", "result.safetensors"))
    with Path("messages.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((text, NAMES[at % 3]) for at, text in enumerate(TRAIN * 4))])
    exec(of_a_bag, known)
    assert known["result"].n_train == len(known["train"])
    assert "<unk>" not in str(known["result"].word_table())
    assert Path("page-of-bag.html").exists()


def test_metrics(capsys):
    """What the page prints stands beside it."""
    known = {}
    run("metrics", known)
    lines = [line for block in blocks("metrics") for line in block.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == [line.partition("#")[2].strip() for line in lines]
    assert len(lines) == 5
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"`within.reliability`, {known['within'].reliability:.2f} here" in page
    scores, labels = torch.randn(4, 200), torch.zeros(4, dtype=torch.long)
    trainer = quiet()
    trainer.test(known["Judged"](), DataLoader([*zip(scores, labels, strict=True)], batch_size=2), verbose=False)
    assert 0 <= trainer.callback_metrics["same class"] <= 1


def test_retraining(known, capsys):
    known |= {"News": News, "train_data": items(TRAIN), "collate": collate}
    run("retraining", known)
    printed = capsys.readouterr().out
    assert "Test example 0: removing its 2 proponents" in printed
    assert "To explain: fall of the target's probability without the 2 strongest proponents" in printed
    assert "To weigh: LDS: rank correlation of summed scores with 8 retrainings on halves" in printed
    assert known["found"].losses.shape == (8, 2, 3)


def named(call: ast.Call) -> object:
    """What an example calls, if it is of this package."""
    function = call.func
    if isinstance(function, ast.Name) and function.id in lightning_tracin.__all__:
        return getattr(lightning_tracin, function.id)
    if not isinstance(function, ast.Attribute):
        return None
    owner = function.value.func if isinstance(function.value, ast.Call) else function.value
    if not isinstance(owner, ast.Name):
        return None
    kind = KNOWN.get(owner.id) or (owner.id in lightning_tracin.__all__ and getattr(lightning_tracin, owner.id))
    return getattr(kind, function.attr) if kind else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_name_what_exists(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "lightning_tracin":
                assert {each.name for each in node.names} <= set(lightning_tracin.__all__)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "result":
                fields = InfluenceResult.__dataclass_fields__
                assert node.attr in fields or hasattr(InfluenceResult, node.attr), node.attr
            if isinstance(node, ast.Call) and (called := named(node)):
                arguments = inspect.signature(called).parameters
                assert {each.arg for each in node.keywords} - {None} <= arguments.keys(), ast.unparse(node)
