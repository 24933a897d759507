"""Losses whose examples have other numbers of labels: tokens of which some have none (-100)."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import HuggingFace
from still_fits import Still
from torch.nn import functional
from torch.utils.data import TensorDataset
from toy import CLASSES, VOCABULARY, fitted, loader

from lightning_tracin.bridge.looks import look_of
from lightning_tracin.gradients.losses import hugging_face_losses

LENGTH = 6


def tagged(counts, seed=0):
    """Texts with a tag at so many first tokens of each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(counts), LENGTH), generator=generator)
    tags = torch.randint(CLASSES, ids.shape, generator=generator)
    return TensorDataset(ids, tags.masked_fill(torch.arange(LENGTH) >= torch.tensor(counts)[:, None], -100))


class Tags(Still):
    """Trains the mean over all the labelled tokens of a batch, and says nothing else."""

    influence_loss = None

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


class Own(Tags):
    """Says losses of single examples that are divided by what the batch holds."""

    def influence_loss(self, batch):
        losses = functional.cross_entropy(self(batch[0]).mT, batch[1], reduction="none").sum(1)
        return losses * len(losses) / (batch[1] != -100).sum()

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()


def test_a_query_with_other_numbers_of_labels_is_compared_with_its_examples_alone(tmp_path):
    fit = fitted(tmp_path, Tags(), loader(tagged([3] * 12)))
    test = tagged([3] * 8 + [1, 3, 6, 2], seed=1)
    alone = fit.influence(loader(test, 1), method="tracin-last").scores
    module = fit.lightning_module.eval()
    ids, tags = test.tensors

    def gradient(row):
        loss = module.training_step((row[0][None], row[1][None]), 0)
        return torch.autograd.grad(loss, list(module.head.parameters()))

    pairs = [(gradient(test[10]), gradient(each)) for each in tagged([3] * 12)]
    expected = torch.tensor([sum(float((a * b).sum()) for a, b in zip(*pair, strict=True)) for pair in pairs])
    torch.testing.assert_close(alone[10] * 1e12, 2 * expected, rtol=1e-4, atol=1e-6)  # two checkpoints
    with pytest.raises(ValueError, match="not a mean of independent losses"):
        fit.influence(loader(test), method="tracin-last")
    with pytest.raises(ValueError, match="not a mean of independent losses"):  # places are labels, too
        fit.influence(loader(TensorDataset(ids[:4], tags[:4])), target=1, positions=[[0], [0, 1], [0], [0, 1, 2]])


@pytest.mark.parametrize(
    ("kind", "cache", "message"),
    [
        (Tags, "training", "not a mean of independent losses"),
        (Tags, "checkpoint", "not a mean of independent losses"),
        (Own, "checkpoint", "its examples have 1, 3 labels, which none before it had"),
    ],
)
def test_a_number_of_labels_that_comes_late_is_looked_at(tmp_path, kind, cache, message):
    counts = [3] * 130
    counts[77] = 1  # none of the 64 that are looked at before training
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, kind(), loader(tagged(counts), 10), cache=cache)


@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy, lambda labels: labels])
def test_a_look_holds_the_number_of_labels(form):
    assert look_of({"input_ids": [4, 5, 6], "labels": form(torch.tensor([2, -100, 1]))})[1] == 2
    assert look_of(([4, 5, 6], form(torch.tensor([-100, -100, 1]))))[1] == 1
    assert look_of({"labels": torch.rand(3)})[1] is None
    assert look_of({"labels": ["B", "I", "O"]})[1] is None


class Tagger(transformers.BertForTokenClassification):
    """A model that weighs its tags, which its configuration does not tell."""

    weight = None

    def forward(self, input_ids, labels):
        found = super().forward(input_ids)
        found.loss = functional.cross_entropy(found.logits.mT, labels, weight=self.weight)
        return found


def tagger(weight):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = Tagger(transformers.BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes))
    model.weight = weight
    return HuggingFace(model, embedding="bert.embeddings.word_embeddings", last="classifier").eval()


@pytest.mark.parametrize("weight", [None, torch.tensor([0.1, 1.0, 5.0])])
def test_the_loss_of_a_model_is_compared_where_a_place_has_no_label_in_a_batch(weight):
    module = tagger(weight)
    ids, tags = tagged([2, 5, 3]).tensors
    batch = {"input_ids": ids, "labels": tags}
    if weight is not None:
        with pytest.raises(ValueError, match="computes its loss in another way"):
            hugging_face_losses(module, batch)
        return
    found = hugging_face_losses(module, batch)
    for row in range(3):
        alone = module(input_ids=ids[row : row + 1], labels=tags[row : row + 1]).loss
        torch.testing.assert_close(found[row], alone)
