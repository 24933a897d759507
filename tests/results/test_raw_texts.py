from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from spellings import TEXTS, trained
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from toy import fitted

from lightning_tracin import InfluenceResult, TracInMixin

TRAIN = [f"{first} {second}" for first in TEXTS for second in TEXTS]
TEST = TEXTS[:3]


class Bag(TracInMixin, pl.LightningModule):
    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.embedding = nn.Embedding(len(tokenizer), 8, padding_idx=tokenizer.pad_token_id)
        self.head = nn.Linear(8, 2)

    def influence_loss(self, batch):
        read = batch["attention_mask"].sum(1, keepdim=True)
        logits = self.head((self.embedding(batch["input_ids"]).sum(1) / read).tanh())
        return functional.cross_entropy(logits, batch["labels"], reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def loader(tokenizer, texts, **options):
    rows = [{**tokenizer(text, truncation=True, max_length=30), "labels": len(text) % 2} for text in texts]
    pad = lambda some: tokenizer.pad(some, return_tensors="pt")  # noqa: E731
    return DataLoader(rows, batch_size=8, collate_fn=pad, **options)


@pytest.fixture(scope="module", params=["WordPiece", "byte-level BPE"])
def asked(request, tmp_path_factory):
    """A tokenizer, and a result of its texts."""
    tokenizer = trained(request.param)
    fit = fitted(tmp_path_factory.mktemp("fit"), Bag(tokenizer), loader(tokenizer, TRAIN, shuffle=True))
    return tokenizer, fit.influence(loader(tokenizer, TEST), k=5)


def test_texts_are_shown_as_they_were_written(asked):
    _, result = asked
    explanations = list(result.with_texts(train=TRAIN, test=TEST).explanations())
    assert [(each.test.text + each.test.unread).split() for each in explanations] == [text.split() for text in TEST]
    for explanation in explanations:
        for pushed in (*explanation.proponents, *explanation.opponents):
            example = pushed.example
            assert "".join((example.text + example.unread).split()) == "".join(TRAIN[example.index].split())
            assert sum(pushed.terms) == pytest.approx(pushed.score, rel=1e-4, abs=1e-9)


def test_long_texts_say_what_the_model_did_not_read(asked):
    _, result = asked
    result = result.with_texts(train=TRAIN)
    listed = [each.example for every in result.explanations() for each in every.proponents]
    assert any(each.unread for each in listed)
    assert any(not each.unread for each in listed)


def test_words_and_scores_stay_what_they_were(asked):
    _, result = asked
    shown = result.with_texts(train=TRAIN, test=TEST)
    for row, indices in enumerate(result.proponents(5).indices.tolist()):
        for index in indices:
            before, after = dict(result.words(row, index)), dict(shown.words(row, index))
            assert sum(after.values()) == pytest.approx(sum(before.values()), rel=1e-6, abs=1e-12)
            written = [part for word in after for part in word.split("…") if word not in ("[CLS]", "[SEP]")]
            assert all(part in TRAIN[index] for part in written)


def test_a_loaded_result_needs_the_tokenizer(asked, tmp_path):
    tokenizer, result = asked
    loaded = InfluenceResult.load(result.save(tmp_path / "r.safetensors"))
    with pytest.raises(ValueError, match=r"needs the fast tokenizer.*NoneType.*tokenizer="):
        loaded.with_texts(train=TRAIN)
    shown = loaded.with_texts(train=TRAIN, test=TEST, tokenizer=tokenizer)
    first = next(iter(shown.explanations())).test
    assert first.text + first.unread == TEST[0]


def test_rows_in_the_place_of_texts(asked):
    _, result = asked
    with pytest.raises(TypeError, match=r"train must have a text, .* but its first is a dict\. .* \[row\['text'\]"):
        result.with_texts(train=[{"text": text} for text in TRAIN])


def test_too_few_texts(asked):
    _, result = asked
    with pytest.raises(ValueError, match=f"train must have a text for each of {len(TRAIN)} examples, but has 3"):
        result.with_texts(train=TEST)
    with pytest.raises(ValueError, match="test must have a text for each of 3 examples, but has 1"):
        result.with_texts(test=TEST[:1])


def test_texts_of_other_examples_are_not_shown(asked):
    _, result = asked
    wrong = result.with_texts(test=[TEST[1], TEST[1], TEST[2]])
    with pytest.warns(UserWarning, match="text given for example 0 is not what its token ids were made of"):
        first = next(iter(wrong.explanations([0], k=1)))
    assert first.test.text == next(iter(result.explanations([0], k=1))).test.text


def test_label_issues_listed_with_texts_in_another_order_are_warned_of(tmp_path, recwarn):
    tokenizer = trained("WordPiece")
    fit = fitted(tmp_path, Bag(tokenizer), loader(tokenizer, TRAIN))
    assert len(fit.label_issues(texts=TRAIN).rows()) == len(TRAIN)
    assert not [str(each.message) for each in recwarn if "token ids were made of" in str(each.message)]
    turned = [*TRAIN[1:], TRAIN[0]]
    with pytest.warns(UserWarning, match=r"Of the first (\d+) texts that are listed, \1 are not what their token ids"):
        fit.label_issues(texts=turned)


def test_texts_with_signs_that_the_tokenizer_does_not_know(tmp_path, recwarn):
    tokenizer = trained("WordPiece")
    train, test = ["The ☃ fell [SEP] again", "déjà ☂ vu", TEXTS[0]], ["☁ and The ☁ stocks", "lines again [SEP]"]
    fit = fitted(tmp_path, Bag(tokenizer), loader(tokenizer, train))
    result = fit.influence(loader(tokenizer, test)).with_texts(train=train, test=test)
    for row, explanation in enumerate(result.explanations()):
        trained_on = [(each.example, train[each.example.index]) for each in explanation.proponents]
        for example, text in [(explanation.test, test[row]), *trained_on]:
            assert "".join((example.text + example.unread).split()) == "".join(text.split())
    assert not [each for each in recwarn if "not what its token ids" in str(each.message)]
    assert "[UNK]" in dict(result.words(0, 0))  # what two different signs share
