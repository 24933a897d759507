"""Texts, rows and data sets in the place of a loader score as the loader does that is made of them by hand."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from spellings import TEXTS, trained
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate
from toy import Toy, fitted, loader, quiet, test_texts
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, DataCollatorWithPadding

from lightning_tracin import TracInMixin
from lightning_tracin.querying.example_forms import typed

LONGEST = 24
TRAIN = [f"{first} {second}" for first in TEXTS[:4] for second in TEXTS]
TEST = [TEXTS[0] + " " + TEXTS[1], *TEXTS[1:5]]  # the first is cut
TOKENIZER = trained("WordPiece")


class Bag(TracInMixin, pl.LightningModule):
    """A bag of words, with two classes."""

    def __init__(self, tokenizer=TOKENIZER) -> None:
        super().__init__()
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.embedding = nn.Embedding(len(TOKENIZER), 8, padding_idx=TOKENIZER.pad_token_id)
        self.head = nn.Linear(8, 2)

    def influence_label_names(self):
        return {0: "short", 1: "long"}

    def influence_loss(self, batch):
        read = batch["attention_mask"].sum(1, keepdim=True)
        logits = self.head((self.embedding(batch["input_ids"]).sum(1) / read).tanh())
        return functional.cross_entropy(logits, batch["labels"], reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def rows(texts, *, name="label"):
    return [{"text": text, name: len(text) % 2} for text in texts]


def tokenised(texts, *, tensors=False, **options):
    found = [TOKENIZER(text, truncation=True, max_length=LONGEST, **options) for text in texts]
    items = [{**each, "labels": len(text) % 2} for each, text in zip(found, texts, strict=True)]
    return [{name: torch.tensor(each[name]) for name in each} for each in items] if tensors else items


def tokenising(some, *, key="label"):
    """A collate function that reads texts."""
    texts = [row["text"] for row in some]
    batch = TOKENIZER(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    return {**batch, "labels": torch.tensor([row[key] for row in some])}


def padding(some):
    """A collate function that must have labels."""
    labels = torch.tensor([each["labels"] for each in some])
    ids = [{"input_ids": each["input_ids"], "attention_mask": each["attention_mask"]} for each in some]
    return {**TOKENIZER.pad(ids, return_tensors="pt"), "labels": labels}


#: Training's data set and collate function, each in another form.
FORMS = {
    "tokenised": (tokenised, partial(TOKENIZER.pad, return_tensors="pt")),
    "collator of transformers": (tokenised, DataCollatorWithPadding(TOKENIZER)),
    "own collate function": (tokenised, padding),
    "padded tensors": (partial(tokenised, tensors=True, padding="max_length"), default_collate),
    "texts": (rows, tokenising),
}


class Column(Dataset):
    """Has the protocol of a data set of Hugging Face, as far as it is used."""

    def __init__(self, data):
        self.data, self.column_names = data, list(data[0])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        assert isinstance(index, int)
        return self.data[index]


def ask(trainer, examples, *, target="prediction", **options):
    """What the model says is explained, which needs no label."""
    return trainer.influence(examples, target=target, **options)


@pytest.fixture(scope="module", params=FORMS)
def fit(request, tmp_path_factory):
    """A trainer, and how its loaders are made."""
    made, collate = FORMS[request.param]
    load = partial(DataLoader, batch_size=8, collate_fn=collate)
    module = Bag()
    return fitted(tmp_path_factory.mktemp("fit"), module, load(made(TRAIN), shuffle=True)), made, load


def test_texts_without_labels_score_as_a_loader_made_by_hand(fit):
    trainer, made, load = fit
    expected = ask(trainer, load(made(TEST)))
    for texts in (TEST, tuple(TEST)):
        result = ask(trainer, texts)
        assert torch.equal(result.scores, expected.scores)
        assert result.test_indices.tolist() == list(range(len(TEST)))
        assert result.test_texts.labels.isnan().all()
    assert torch.equal(ask(trainer, TEST[0]).scores, ask(trainer, load(made(TEST[:1]))).scores)


def test_texts_are_shown_as_they_were_written(fit):
    trainer, _, _ = fit
    result = ask(trainer, TEST)
    for explanation, text in zip(result.explanations(), TEST, strict=True):
        assert (explanation.test.text + explanation.test.unread).split() == text.split()
    assert next(result.explanations()).test.unread  # it was cut where training's were
    shown = result.with_texts(train=TRAIN)
    assert shown.raw_test == TEST


def test_pairs_of_texts(fit):
    trainer, made, load = fit
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    if made is rows:
        pytest.skip("training's collate function reads one text of each row")
    padded = {"padding": "max_length"} if made is not tokenised else {}
    items = [{**TOKENIZER(*each, truncation=True, max_length=LONGEST, **padded), "labels": 0} for each in pairs]
    if padded:
        items = [{name: torch.tensor(each[name]) for name in each} for each in items]
    assert torch.equal(ask(trainer, pairs).scores, ask(trainer, load(items)).scores)


@pytest.mark.parametrize("form", ["rows", "named", "other name", "data set", "like training"])
def test_rows_and_data_sets_with_labels(fit, form):
    trainer, made, load = fit
    given = {
        "rows": rows(TEST),
        "named": [{"text": text, "label": ["short", "long"][len(text) % 2]} for text in TEST],
        "other name": [{"sentence": text, "labels": len(text) % 2, "label": None} for text in TEST],
        "data set": Column(rows(TEST)),
        "like training": Column(made(TEST)),
    }[form]
    if form in ("named", "other name") and made is rows:
        pytest.skip("training's collate function reads these columns itself")
    expected, result = (ask(trainer, each, target="label") for each in (load(made(TEST)), given))
    assert torch.equal(result.scores, expected.scores)
    assert torch.equal(result.test_texts.labels, expected.test_texts.labels)
    assert result.test_texts.labels.tolist() == [len(text) % 2 for text in TEST]


class OneLogit(Bag):
    """Takes labels in the form that its loss needs."""

    def __init__(self, tokenizer=TOKENIZER) -> None:
        super().__init__(tokenizer)
        self.head = nn.Linear(8, 1)

    def influence_loss(self, batch):
        read = batch["attention_mask"].sum(1, keepdim=True)
        logits = self.head((self.embedding(batch["input_ids"]).sum(1) / read).tanh())
        logits = logits.reshape(batch["labels"].shape)
        return functional.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").reshape(-1)


@pytest.mark.parametrize(
    "form",
    [float, lambda label: [float(label)], lambda label: torch.tensor([float(label)])],
    ids=["float", "list", "tensor"],
)
def test_labels_of_a_single_logit_come_in_the_form_of_trainings(tmp_path, form):
    def made(texts):
        return [{**item, "labels": form(item["labels"])} for item in tokenised(texts)]

    def collate(items):
        labels = torch.stack([torch.as_tensor(item["labels"]) for item in items])
        ids = [{"input_ids": item["input_ids"], "attention_mask": item["attention_mask"]} for item in items]
        return {**TOKENIZER.pad(ids, return_tensors="pt"), "labels": labels}

    load = partial(DataLoader, batch_size=8, collate_fn=collate)
    trainer = fitted(tmp_path, OneLogit(), load(made(TRAIN), shuffle=True), trainer={"max_epochs": 1})
    expected = trainer.influence(load(made(TEST)))
    named = [{"text": row["text"], "label": ("short", "long")[row["label"]]} for row in rows(TEST)]
    for given in (rows(TEST), named):
        found = trainer.influence(given)
        assert torch.equal(found.scores, expected.scores)
        assert [of.test.label for of in found.explanations()] == [row["label"] for row in named]
    assert torch.equal(ask(trainer, TEST).scores, ask(trainer, load(made(TEST))).scores)


def test_rows_that_are_tokenised_already(fit):
    trainer, made, load = fit
    if made is rows:
        pytest.skip("training's collate function reads texts")
    extra = [{**each, "note": "not for training"} for each in made(TEST)]
    assert torch.equal(ask(trainer, extra).scores, ask(trainer, load(made(TEST))).scores)


def test_in_another_process_the_tokenizer_pads(tmp_path):
    """Or the loader that is passed makes the batches, or that of a datamodule, which may have the tokenizer."""
    load = partial(DataLoader, batch_size=8, collate_fn=padding)
    trainer = fitted(tmp_path / "trace", Bag(), load(tokenised(TRAIN)))
    expected = ask(trainer, load(tokenised(TEST))).scores

    class News(pl.LightningDataModule):
        tokenizer = TOKENIZER

        def train_dataloader(self):
            return load(tokenised(TRAIN))

    for model, options in (
        (Bag(), {}),
        (Bag(), {"train_dataloaders": load(tokenised(TRAIN))}),
        (Bag(None), {"datamodule": News()}),
    ):
        result = ask(quiet(), TEST, model=model, trace=tmp_path / "trace", **options)
        torch.testing.assert_close(result.scores, expected, rtol=1e-6, atol=0)
        assert next(result.explanations()).test.text
    assert torch.equal(
        ask(quiet(), rows(TEST), model=Bag(), trace=tmp_path / "trace").test_texts.labels.isnan(),
        torch.zeros(5, dtype=torch.bool),
    )


def test_before_gradients_are_stored(tmp_path):
    """The longest training text is known only when they are, and texts are cut at it the first time, too."""
    load = partial(DataLoader, batch_size=8, collate_fn=padding)
    trainer = fitted(tmp_path / "trace", Bag(), load(tokenised(TRAIN)), cache="on_demand")
    first = ask(trainer, TEST)
    assert len(first.test_texts.ids_of(0)) == LONGEST
    assert torch.equal(first.scores, ask(trainer, load(tokenised(TEST))).scores)


def test_a_language_model_is_its_own_label(tmp_path):
    class Writer(TracInMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.tokenizer = TOKENIZER
            sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
            self.model = BertForMaskedLM(
                BertConfig(vocab_size=len(TOKENIZER), max_position_embeddings=LONGEST, **sizes)
            )

        def forward(self, **batch):
            return self.model(**batch)

        def training_step(self, batch, batch_idx):
            return self.influence_loss(batch).mean()

        configure_optimizers = Bag.configure_optimizers

    def items(texts):
        return [{"input_ids": TOKENIZER(text, truncation=True, max_length=LONGEST)["input_ids"]} for text in texts]

    def labelled(some):
        batch = TOKENIZER.pad([{"input_ids": each["input_ids"]} for each in some], return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def padded(texts, masks):
        encoded = TOKENIZER(texts, truncation=True, max_length=LONGEST, padding="max_length", return_tensors="pt")
        ids, read = encoded["input_ids"], encoded["attention_mask"]
        labels = ids.masked_fill(read == 0, -100) if masks else ids
        names = ("input_ids", "attention_mask", "labels")
        return [dict(zip(names, each, strict=True)) for each in zip(ids, read, labels, strict=True)]

    for made, collate in (
        (partial(padded, masks=True), default_collate),
        (partial(padded, masks=False), default_collate),
        (items, labelled),
        (lambda texts: [{**each, "labels": each["input_ids"]} for each in items(texts)], labelled),
        (items, DataCollatorForLanguageModeling(TOKENIZER, mlm=False)),
    ):
        load = partial(DataLoader, batch_size=8, collate_fn=collate)
        trainer = fitted(tmp_path, Writer(), load(made(TRAIN[:16])), trainer={"max_epochs": 1}, overwrite=True)
        assert torch.equal(ask(trainer, TEST).scores, ask(trainer, load(made(TEST))).scores)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["a text"],
            r"training's.*is a str, but that of training is a tuple of 2 \(Tensor, Tensor\).*DataLoader\(data",
        ),
        ([{"text": "a"}], "is a dict with text, but that of training is a tuple"),
        ([test_texts().tensors], r"is a tuple of 2 \(Tensor, Tensor\), but that of training is a tuple"),
        (list(loader(test_texts())), r"is a list of 2 \(Tensor, Tensor\), but that of training"),
        ({"a text", "another"}, r"got set, which gives them once, or in no order\. Pass a list"),
        (iter(["a text"]), "got list_iterator, which gives them once"),
        ([], "list of test examples is empty"),
        ([[]], "list of 0"),
        (["a", 3], "some are texts"),
        ("", "example is a str"),
        (b"text", "must come in a DataLoader, but got bytes"),
        (test_texts().tensors[0], "must come in a DataLoader, but got Tensor"),
        ({"input_ids": test_texts().tensors[0]}, r"dict with input_ids, whose values are neither.*\[row\]"),
        ({"text": "some text"}, r"dict with text, whose values are neither"),
        ({}, "no test loader in what was passed"),
        (__file__, r"is taken for a text.*but it is a file.*ask about this very text, pass \['"),
        (Column, "are the class Column. Pass one of it"),
        ([pl.LightningDataModule()], "those of one datamodule"),
    ],
    ids=lambda each: None if isinstance(each, str) else "given",
)
def test_what_cannot_be_brought_into_trainings_form(toy, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        toy.influence(given)


def test_items_of_trainings_own_form(toy):
    expected = toy.influence(loader(test_texts()))
    assert torch.equal(toy.influence(test_texts()).scores, expected.scores)
    assert torch.equal(toy.influence(list(test_texts())).scores, expected.scores)


def test_without_tokenizer_or_loader(toy, trace, tmp_path):
    with pytest.raises(ValueError, match=r"not known how training made batches.*train_dataloaders=.*DataLoader\(data"):
        quiet().influence(["a text"], Toy(), trace=trace)
    load = partial(DataLoader, batch_size=8, collate_fn=padding)
    trainer = fitted(tmp_path, Bag(None), load(tokenised(TRAIN)))
    with pytest.raises(ValueError, match=r"Texts need a tokenizer.*Name it self\.tokenizer"):
        ask(trainer, TEST)


def test_a_collate_function_that_fails_is_named_with_what_it_was_given(fit):
    trainer, made, _ = fit
    if made is rows:
        message = (
            "of training, tokenising, .*KeyError: 'text'.*is a dict with headline, label, but that of training is a"
        )
        given = [{"headline": 3, "label": 1}]
    else:
        message = r"hold several texts \(head, body\).*as in \[row\['head'\] for row in rows\]"
        given = [{"head": "a", "body": "b"}]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ask(trainer, given)


def test_labels_that_are_not_known_or_not_all_there(fit):
    trainer, made, _ = fit
    if made is not rows:
        with pytest.raises(ValueError, match="label 'huge' is none of the model's, which tells 'short', 'long'"):
            ask(trainer, [{"text": "a", "label": "huge"}])
    with pytest.raises(ValueError, match="Test example 1 has no label, but the first one has one"):
        ask(trainer, [*rows(TEST[:1]), {"text": "a"}])


def test_rows_of_two_texts_that_training_reads(tmp_path):
    def pairing(some):
        texts = [[row[name] for row in some] for name in ("premise", "hypothesis")]
        batch = TOKENIZER(*texts, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in some])}

    def pairs(label):
        return [{"premise": a, "hypothesis": b, **label} for a, b in itertools.pairwise(TEST)]

    load = partial(DataLoader, batch_size=8, collate_fn=pairing)
    trainer = fitted(tmp_path, Bag(), load(pairs({"label": 1})), trainer={"max_epochs": 1})
    assert torch.equal(ask(trainer, pairs({})).scores, ask(trainer, load(pairs({"label": 0}))).scores)
    with pytest.raises(ValueError, match="cannot be brought into the form of training's"):
        ask(trainer, TEST)


def test_a_label_that_is_lent_leaves_nothing_in_a_batch(tmp_path):
    """As a collator of transformers would leave decoder inputs."""

    def shifting(some):
        batch = padding(some)
        return {**batch, "decoder_input_ids": batch["labels"][:, None] + 1}

    load = partial(DataLoader, batch_size=8, collate_fn=shifting)
    trainer = fitted(tmp_path, Bag(), load(tokenised(TRAIN)), trainer={"max_epochs": 1})
    with pytest.raises(ValueError, match=r"shifting, makes more of an example's label.*Pass rows with labels"):
        ask(trainer, TEST)
    labelled = [ask(trainer, each, target="label").scores for each in (rows(TEST), load(tokenised(TEST)))]
    assert torch.equal(*labelled)


def test_data_sets_of_hugging_face(fit):
    datasets = pytest.importorskip("datasets")
    trainer, made, load = fit
    expected = ask(trainer, load(made(TEST))).scores
    for data in (rows(TEST), made(TEST)):
        split = datasets.Dataset.from_list([dict(each) for each in data])
        given = split if made is rows or data[0].keys() == {"text", "label"} else split.with_format("torch")
        assert torch.equal(ask(trainer, given).scores, expected)
    both = ask(trainer, datasets.DatasetDict({"a": split, "b": split.select([0])}))
    assert both.test_loader_names == ("a", "b")
    with pytest.raises(TypeError, match="must come in a DataLoader, but got IterableDataset"):
        ask(trainer, split.to_iterable_dataset())


def test_sets_of_labels_in_whole_numbers_become_training_s_floats():
    assert typed([1, 0, 1], [0.0, 0.0, 1.0]) == [1.0, 0.0, 1.0]
    assert all(isinstance(each, float) for each in typed([1, 0, 1], [0.0, 0.0, 1.0]))
    assert typed([4, 7], [1, 2, 3]) == [4, 7]
