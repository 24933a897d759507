"""Mistakes that are easily made on the way are called what they are, with what to write instead."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from families import bert_classifier, classes, labelled_texts
from mistakes import Plain, poisoned
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from toy import Data, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import (
    InfluenceResult,
    Trace,
    TracInCallback,
    TracInLast,
    TracInLayer,
    TracInMixin,
    TracInSum,
    TracInWE,
)


class Broken(Plain):
    """Its loss is not finite once it is told so."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__(lambda logits, labels: functional.cross_entropy(logits, labels) * self.value)
        self.value = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hugging_face_model_whose_loss_is_not_finite_before_training(tmp_path, value):
    module = bert_classifier(num_labels=3)
    with torch.no_grad():
        module.model.classifier.bias[0] = value
    with pytest.raises(
        ValueError, match=r"The loss of training example 0 is NaN or infinite before.*label and its text"
    ):
        fitted(tmp_path, module, DataLoader(labelled_texts(classes), batch_size=4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_mean_that_is_not_finite(tmp_path, value):
    message = (
        f"training_step of Broken returned {value:g} for a batch of 4 examples, and {value:g} for number 0.*finite"
    )
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, Broken(value))
    trainer = fitted(tmp_path, module := Broken(), overwrite=True, trainer={"max_epochs": 1})
    module.value = value
    with pytest.raises(ValueError, match=message):
        trainer.influence(loader(test_texts()))


def test_a_gradient_that_is_not_finite_though_the_loss_is(tmp_path):
    class Rooted(Toy):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            return losses + (losses - losses.detach()).abs().sqrt()  # 0 with an infinite slope

    with pytest.raises(ValueError, match="The gradient of training example 0 is NaN or infinite before"):
        fitted(tmp_path, Rooted())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_example_whose_loss_is_not_finite_at_a_query(tmp_path, value):
    module, data = poisoned(3, value)
    trainer = fitted(tmp_path, module, loader(), trainer={"max_epochs": 1})
    with pytest.raises(ValueError, match=r"The loss of test example 3 is NaN or infinite\..*learning rate"):
        trainer.influence(loader(data))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b"], r"one folder, but got a list: \['a', 'b'\].*one by one.*Trace\.from_checkpoints"),
        (3, "one folder, but got a int: 3"),
        (__file__, r"A trace is a folder, but .*test_told_mistakes\.py is a file\..*Trace\.from_checkpoints"),
    ],
    ids=["list", "number", "file"],
)
def test_what_is_no_trace(toy, tmp_path, given, message):
    result = toy.influence(loader(test_texts()), k=1).save(tmp_path / "result.safetensors")
    for ask in (
        lambda: toy.influence(loader(test_texts()), trace=given),
        lambda: toy.self_influence(trace=given),
        lambda: Trace(given),
        lambda: InfluenceResult.load(result, trace=given),
    ):
        with pytest.raises((TypeError, NotADirectoryError), match=message):
            ask()


def test_what_is_no_path(tmp_path):
    with pytest.raises(TypeError, match=r"A result is one file, but got a list.*one by one"):
        InfluenceResult.load([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(TypeError, match=r"The dirpath must be the path of one folder, but got a list: \['a'\]"):
        TracInCallback(["a"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TracInWE, r"write TracInWE\(\)\."),
        (TracInLast, r"write TracInLast\(\)\."),
        (TracInLayer, r"write TracInLayer\(\"name\.of\.the\.layer\"\)"),
        (TracInSum, r"write TracInSum\(\(TracInWE\(\), TracInLast\(\)\)\)"),
        ("tracin_we", 'Did you mean "tracin-we"'),
        ("TracInLast", 'Did you mean "tracin-last"'),
        ("tracin-lst", 'Did you mean "tracin-last"'),
        ("tracin-layer", r"Did you mean TracInLayer\("),
        ("trak", r"but got 'trak'\.$"),
        (("tracin-we", "tracin-last"), r"Ask for one: 'tracin-we'\. Scores of several are added by a TracInSum"),
    ],
    ids=str,
)
def test_what_is_no_method(toy, method, message):
    for ask in (lambda: toy.influence(loader(test_texts()), method=method), lambda: toy.self_influence(method=method)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_parts_that_are_classes():
    with pytest.raises(ValueError, match=r"parts must be .*not their classes, as in TracInSum\(\(TracInWE\(\), "):
        TracInSum((TracInWE, TracInLast()))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("tracin-last", r"'tracin-last', a string\. Write methods=\('tracin-last',\): with the comma"),
        ("encoder.layer.0", r"a string\. Write methods=\('encoder\.layer\.0',\)"),
        (TracInWE(), r"\. Write 'tracin-we' for TracInWE\("),
        ((TracInWE(), TracInLast), r"\. Write 'tracin-we' for TracInWE\("),
        ([TracInLast], r"\. Write 'tracin-last' for <class"),
        ([TracInLayer("hidden")], r"\. Write 'hidden' for TracInLayer\("),
        (("tracin_we", "tracin-last"), r"\. Write 'tracin-we' for 'tracin_we'"),
        (("tracin-we", "tracin-lst"), r"\. Write 'tracin-last' for 'tracin-lst'"),
        (None, r"but got None\.$"),
        ((), r"but got \(\)\.$"),
    ],
    ids=str,
)
def test_methods_to_record_that_are_no_names(methods, message):
    with pytest.raises(ValueError, match=message):
        TracInCallback(methods=methods)


def test_k_is_no_flag(toy):
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, but got True"):
        toy.influence(loader(test_texts()), k=True)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda t: t.self_influence(Data()),
            r"or a Hugging Face model, but got Data\..*is passed as datamodule=",
        ),
        (lambda t: t.self_influence(texts()), r"but got TensorDataset\..*self_influence\(model, train_dataloaders="),
        (lambda t: t.influence(loader(), "trace"), r"but got str\..*a folder as trace="),
        (lambda t: t.influence(loader(), Toy), r"but got the class Toy\. Pass one of it: Toy\("),
        (lambda t: t.influence(datamodule=loader()), "datamodule must be a LightningDataModule, but got DataLoader"),
        (lambda t: t.influence(datamodule=Data), r"datamodule is the class Data\. Pass one of it"),
        (
            lambda t: t.influence(loader(), train_dataloaders=texts()),
            r"training set must come in a .*DataLoader, but got TensorDataset.*train_dataloaders=DataLoader\(data",
        ),
        (lambda t: t.self_influence(train_dataloaders="data"), "must come in a .*DataLoader, but got str"),
    ],
)
def test_one_thing_in_the_place_of_another(toy, ask, message):
    with pytest.raises(TypeError, match=message):
        ask(toy)


def test_a_fit_with_no_step_left(tmp_path):
    done = fitted(tmp_path / "trace")
    done.save_checkpoint(tmp_path / "done.ckpt", weights_only=False)
    resumed = quiet(callbacks=[TracInCallback(tmp_path / "trace")])
    with pytest.warns(
        UserWarning, match=r"had no step to train \(max_epochs=2.*, or ask with trace='.*trace' for what"
    ):
        resumed.fit(Toy(), loader(shuffle=True), ckpt_path=tmp_path / "done.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"recorded nothing in this process.*larger max_epochs, or pass the folder"):
        resumed.influence(loader(test_texts()))
    again = resumed.influence(loader(test_texts()), trace=tmp_path / "trace")
    assert torch.equal(again.scores, done.influence(loader(test_texts())).scores)


class Siamese(TracInMixin, pl.LightningModule):
    """Two encoders, and the cosine of what they say: no layer is the last one."""

    def __init__(self, *, projected: bool = False) -> None:
        super().__init__()
        self.question, self.answer = (nn.Embedding(40, 8, padding_idx=0) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) if projected else None

    def influence_loss(self, batch):
        ids, _ = batch
        sides = [self.question(ids[:, ::2]).sum(1), self.answer(ids[:, 1::2]).sum(1) + 0.1]
        if self.projections is not None:
            sides = [projection(side) for projection, side in zip(self.projections, sides, strict=True)]
        return 1 - functional.cosine_similarity(*sides)

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Asking(Siamese):
    def influence_embedding_layer(self):
        return self.question


def test_two_encoders_without_a_head(tmp_path):
    with pytest.raises(
        ValueError, match=r"question \(\(40, 8\)\), answer .*influence_embedding_layer.*return self\.question"
    ):
        fitted(tmp_path, Siamese())
    for module in (Asking(), Asking(projected=True)):
        with pytest.raises(ValueError, match=r"feeds? the loss.*no head.*methods=\(\"tracin-we\",\)"):
            fitted(tmp_path, module, methods=("tracin-last",))
    trainer = fitted(tmp_path, Asking())
    assert [site.name for site in trainer.callbacks[0].trace.sites] == ["tracin-we"]
    with pytest.raises(
        ValueError, match=r"recorded \('tracin-we',\).*no head.*ask by a method whose layer was recorded"
    ):
        trainer.influence(loader(test_texts()), method="tracin-last")


@pytest.mark.parametrize("rows", [[{"text": "a cup", "label": 0}] * 3, ["a cup"] * 3, list(texts(3))])
def test_examples_for_a_training_loader(tmp_path, rows):
    fitted(tmp_path, cache="on_demand")
    with pytest.raises(ValueError, match=r"The training set is a list of 3 examples. Pass a loader.*DataLoader"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path, train_dataloaders=rows)
    loaders = [(loader(), loader()), {"a": loader()}]
    with pytest.raises(ValueError, match="Influence needs one training loader, but got 2"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path, train_dataloaders=loaders)
