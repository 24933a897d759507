"""The layers that gradients are taken at, where a module does not name them."""

from __future__ import annotations

import logging
import re

import pytest
import pytorch_lightning as pl
import torch
import transformers
from brute_force import BruteForce, dense_gradients, relative_error
from torch import nn
from torch.nn import functional
from toy import VOCABULARY, Toy, fitted, loader, test_texts, texts

from lightning_tracin import Trace, TracInMixin
from lightning_tracin.bridge.mixin import embedding_layer_of


class Retriever(TracInMixin, pl.LightningModule):
    """A bi-encoder: how near the two halves of its input are to each other, and no head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def influence_loss(self, batch):
        ids, labels = batch
        first, second = (self.encode(half) for half in ids.split([3, 4], dim=1))
        return (functional.cosine_similarity(first, second) - labels.float() / 2) ** 2

    def encode(self, ids):
        encoded = self.encoder(ids)
        return getattr(encoded, "last_hidden_state", encoded).mean(1)

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


WITHOUT_HEAD = {
    "no linear layer": (lambda: nn.Embedding(VOCABULARY, 8, padding_idx=0), "No nn.Linear of Retriever feeds"),
    "several before the loss": (bert, r"[0-9]+ linear layers of Retriever feed the loss directly"),
}


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize(("encoder", "reason"), WITHOUT_HEAD.values(), ids=WITHOUT_HEAD)
def test_without_a_head_words_are_recorded_alone(tmp_path, caplog, encoder, reason, cache):
    torch.manual_seed(0)
    module = Retriever(encoder())
    with caplog.at_level(logging.INFO):
        fit = fitted(tmp_path, module, loader(), cache=cache, trainer={"max_epochs": 1})
    (message,) = (each.message for each in caplog.records if "TracInCallback records" in each.message)
    assert message.startswith("TracInCallback records tracin-we alone: ")
    assert re.search(reason, message)
    trace = Trace(tmp_path)
    assert [site.name for site in trace.sites] == ["tracin-we"]
    with pytest.raises(ValueError, match=r"recorded \('tracin-we',\).*no single linear layer feeds the loss"):
        fit.influence(loader(test_texts()), method="tracin-last")
    scores = fit.influence(loader(test_texts())).scores
    if cache == "training":  # of the weights of the moment
        assert scores.abs().sum() > 0
        return
    module.load_state_dict(trace.checkpoints[0].weights())
    table = module.get_submodule(trace.sites[0].layer)
    sides = [
        dense_gradients(
            module, table, ([part[None] for part in row] for row in side), lambda b: module.influence_loss(b)[0]
        )
        for side in (test_texts(), texts())
    ]
    assert relative_error(scores, BruteForce([0.1], [sides[0]], [sides[1]]).scores()) < 1e-5


def test_what_was_asked_for_is_not_left_out(tmp_path):
    for methods in (("tracin-last",), ("tracin-we", "tracin-last", "encoder.*")):
        with pytest.raises(ValueError, match=r"No nn\.Linear of Retriever feeds the losses"):
            fitted(tmp_path, Retriever(nn.Embedding(VOCABULARY, 8)), methods=methods)


class Tables(Toy):
    """Several tables; the second one is called with what it is told to be."""

    def __init__(self, second=None):
        super().__init__()
        self.other = nn.Embedding(VOCABULARY, 8)
        self.second = second

    def forward(self, ids):
        vectors = self.embedding(ids)
        if self.second is not None:
            vectors = vectors + self.other(self.second(ids))
        return self.head(torch.tanh(self.hidden(vectors.sum(1))))


@pytest.mark.parametrize(
    "second",
    [
        None,
        lambda ids: torch.arange(ids.shape[1]),
        lambda ids: torch.arange(ids.shape[1]).expand_as(ids),
        lambda ids: (ids != 0).cumsum(1) * (ids != 0),
        lambda ids: (ids != 0).long(),
    ],
    ids=["uncalled", "positions", "a row of them each", "positions of words", "segments"],
)
def test_the_table_that_is_called_with_the_ids_is_meant(tmp_path, second):
    assert [site.layer for site in Trace(fitted(tmp_path, Tables(second)).callbacks[0].trace.path).sites] == [
        "embedding",
        "head",
    ]


@pytest.mark.parametrize("second", [lambda ids: ids, lambda ids: ids.flip(1), lambda ids: (ids * 7) % VOCABULARY])
def test_two_tables_of_words_are_listed(tmp_path, second):
    with pytest.raises(ValueError, match=r"2 candidates for the word embedding layer: embedding \(.*, other \("):
        fitted(tmp_path, Tables(second))


def test_of_batches_with_names_those_of_ids_count():
    module = Tables(lambda ids: torch.arange(ids.shape[1]).expand_as(ids))
    ids, labels = texts()[:4]
    for batch in (
        {"input_ids": ids, "position_ids": ids * 0, "labels": ids},
        {"tokens": ids, "token_type_ids": ids * 0, "labels": labels, "attention_mask": ids * 0},
        [{"tokens": ids}, labels],
    ):
        assert embedding_layer_of(module, lambda: module.influence_loss((ids, labels)), batch) is module.embedding


class OwnTable(Toy):
    """Reads words by a table of its own, which a Hugging Face model is given vectors of; a teacher does not learn."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.bert, self.teacher = bert(), bert()

    def forward(self, ids):
        with torch.no_grad():
            taught = self.teacher(ids).last_hidden_state
        return self.head(self.bert(inputs_embeds=self.embedding(ids)).last_hidden_state.mean(1) + taught.mean(1))


class Student(OwnTable):
    def forward(self, ids):
        with torch.no_grad():
            taught = self.teacher(ids).last_hidden_state
        return self.head((self.bert(ids).last_hidden_state + taught).mean(1))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(OwnTable, "embedding"), (Student, "bert.embeddings.word_embeddings")],
    ids=["vectors", "student"],
)
def test_the_table_that_reads_words_with_gradients_is_meant(kind, name):
    module, batch = kind(), texts()[:4]
    found = embedding_layer_of(module, lambda: module.influence_loss(batch), batch)
    assert found is module.get_submodule(name)


class Probe(Toy):
    """A head on an encoder that is frozen."""

    detached = False

    def __init__(self):
        super().__init__()
        del self.embedding
        self.bert = bert()

    def forward(self, ids):
        with torch.set_grad_enabled(self.detached):
            encoded = self.bert(ids).last_hidden_state.mean(1)
        return self.head(encoded.detach())


class Detached(Probe):
    detached = True


def test_a_linear_probe_is_told_to_record_its_last_layer(tmp_path):
    with pytest.raises(ValueError, match=r"influence_embedding_layer\(\).*linear probe.*methods=\(\"tracin-last\",\)"):
        fitted(tmp_path, Probe())
    with pytest.warns(UserWarning, match="The gradients of all words of the first training examples are zero"):
        fitted(tmp_path / "detached", Detached())
    fitted(tmp_path / "last", Probe(), methods=("tracin-last",))
