"""What ``methods`` and ``projection`` stand for, and what is said of names that stand for nothing."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from families import FAMILIES
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInCallback, TracInLast, TracInLayer, TracInSum, TracInWE
from lightning_tracin.storage.encoding import StorageOptions


class WithUnused(Toy):
    """Has a layer that no loss calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


def sites(path, module=None, **options):
    fitted(path, module, trainer={"max_epochs": 1}, **options)
    return [(site.key, site.name, site.layer) for site in Trace(path).sites]


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (("tracin-we",), [("words", "tracin-we", "embedding")]),
        (("tracin-last", "tracin-we"), [("words", "tracin-we", "embedding"), ("linear-0", "tracin-last", "head")]),
        (("hidden",), [("linear-0", "hidden", "hidden")]),
        (("head", "tracin-last"), [("linear-0", "tracin-last", "head")]),  # one site by two names is stored once
        (
            ("h*", "tracin-we"),
            [("words", "tracin-we", "embedding"), *[(f"linear-{i}", n, n) for i, n in enumerate(("hidden", "head"))]],
        ),
        (("*", "hidden"), [("linear-0", "hidden", "hidden"), ("linear-1", "head", "head")]),
    ],
    ids=str,
)
def test_methods_name_sites(tmp_path, methods, expected):
    assert sites(tmp_path / "trace", WithUnused(), methods=methods) == expected


def test_a_layer_that_is_named_must_be_called(tmp_path):
    with pytest.raises(ValueError, match=r"The layer Linear\(in_features=3.* was not called when the loss"):
        sites(tmp_path / "trace", WithUnused(), methods=("unused",))
    with pytest.raises(ValueError, match=r"No layer that methods='unus\*' stands for is called"):
        sites(tmp_path / "trace", WithUnused(), methods=("unus*",))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("hiden",), r"methods names 'hiden', but Toy has no nn.Linear.*nearest are: hidden"),
        (("embedding",), r"methods names 'embedding', but Toy has no nn.Linear, nn.Conv1d"),
        (("encoder.*",), r"methods names 'encoder\.\*', but Toy has no"),
    ],
)
def test_names_of_no_layer(tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        sites(tmp_path / "trace", methods=methods)


def test_the_parts_of_an_adapter_are_named(tmp_path):
    family = FAMILIES["lora"]
    name = "model.base_model.model.bert.encoder.layer.0.attention.self.query"
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", methods=(name,))])
    with pytest.raises(ValueError, match=rf"Inside of it are: {name}.base_layer, {name}.lora_A.default, "):
        trainer.fit(family.build(), family.train_loader())


@pytest.mark.parametrize("methods", [(), "tracin-we", ("",), (3,), None])
def test_methods_that_are_none(methods):
    with pytest.raises(ValueError, match=r"methods must be some of \(\"tracin-we\", \"tracin-last\"\), and names"):
        TracInCallback(methods=methods)


@pytest.mark.parametrize("projection", ["4", (4,), (4, 5, 6), (4.0, 5)])
def test_projections_that_are_none(projection):
    with pytest.raises(ValueError, match="projection must be a pair of whole numbers"):
        TracInCallback(projection=projection)
    with pytest.raises(ValueError, match=r"projection must be a pair .* of at least 1, .* but got \(4, 0\)"):
        TracInCallback(projection=(4, 0))


def test_projections_of_no_site(tmp_path):
    with pytest.raises(ValueError, match=r"projection=4 is for word gradients .* methods=\('tracin-last',\)"):
        sites(tmp_path / "trace", methods=("tracin-last",), projection=4)
    with pytest.raises(ValueError, match=r"projection=\(4, 2\) is for linear layers .* methods=\('tracin-we',\)"):
        sites(tmp_path / "trace", methods=("tracin-we",), projection=(4, 2))


def test_adam_does_not_go_with_projected_matrices(tmp_path):
    family = FAMILIES["bert-classes"]
    layer = "model.bert.encoder.layer.0.output.dense"
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", methods=(layer,), projection=(4, 4))])
    trainer.fit(family.build(), family.train_loader())
    (site,) = trainer.callbacks[0].trace.sites
    assert (site.shape, site.projection) == ("matrix", (4, 4))
    assert trainer.influence(family.test_loader(), method=TracInLayer(layer)).scores.any()
    with pytest.raises(ValueError, match="gradients projected to 4 and 4 numbers, which Adam's second moments"):
        trainer.influence(family.test_loader(), method=TracInLayer(layer, precondition="adam"))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TracInLayer("hidden"), r"did not record the layer of TracInLayer\(name='hidden'.*Fit again with \"hidden\""),
        (TracInSum((TracInWE(), TracInLayer("hidden"))), r"did not record the layer of TracInLayer.*with \"hidden\""),
    ],
)
def test_a_layer_that_was_not_recorded(toy, method, message):
    with pytest.raises(ValueError, match=message):
        toy.influence(loader(test_texts()), method=method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TracInSum((TracInWE(),)), "parts must be two or more of TracInWE"),
        (lambda: TracInSum(TracInWE()), "parts must be two or more of TracInWE"),
        (lambda: TracInSum(("tracin-we", "tracin-last")), "parts must be two or more of TracInWE"),
        (lambda: TracInSum((TracInWE(), TracInWE(top_words=1))), "parts must be methods of which at most one"),
        (lambda: TracInSum((TracInWE(), TracInLast()), mix=(1,)), "mix must be 2 numbers, one for each part"),
        (
            lambda: TracInSum((TracInWE(), TracInLast()), mix=(1, float("nan"))),
            r"mix\[1\] must be .*, but got nan",
        ),
        (lambda: TracInSum((TracInWE(), TracInLast()), scales=(1,)), "scales must be 2 numbers, one for each part"),
        (lambda: TracInSum((TracInWE(), TracInLast()), scales=(1, 0)), r"scales\[1\] must be a finite number above 0"),
        (lambda: TracInSum((TracInWE(), TracInLast()), scales=(1, float("inf"))), r"scales\[1\] must be .*got inf"),
        (lambda: TracInLast(weights="rate"), "weights must be 'learning-rate', 'equal' or 'residual', but got 'rate'"),
        (lambda: TracInLayer(""), "name must be the dotted name of a layer"),
        (lambda: TracInLayer("a", normalize="unit"), "normalize must be None, 'train' or 'cosine'"),
    ],
)
def test_methods_with_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Validated(Toy):
    def validation_step(self, batch, batch_idx):
        self.influence_loss(batch)


class Tagger(Toy):
    """Tags every word: its head is applied at many positions."""

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))

    def influence_loss(self, batch):
        ids, labels = batch
        return nn.functional.cross_entropy(
            self(ids).movedim(-1, 1), (ids + labels[:, None]) % 3, reduction="none"
        ).mean(1)


def test_a_head_at_many_positions_is_stored_as_a_matrix(tmp_path):
    """With (8 + 1) inputs and 3 outputs a matrix has 27 numbers, two factors at 7 positions 84 and their norms."""
    trainer = fitted(tmp_path / "trace", Tagger())
    assert [site.shape for site in Trace(tmp_path / "trace").sites] == ["words", "matrix"]
    scores = trainer.influence(loader(test_texts()), method="tracin-last").scores
    own = trainer.self_influence(method="tracin-last")
    assert scores.any()
    torch.testing.assert_close(
        own, trainer.influence(loader(), method="tracin-last").scores.diagonal(), rtol=1e-4, atol=1e-8
    )


def test_the_first_site_explains_validations(tmp_path):
    """Without words and last layer, that is the first layer that methods name."""
    trainer = quiet(
        logger=CSVLogger(tmp_path), callbacks=[TracInCallback(methods=("hidden",), dtype="float32", log_examples=2)]
    )
    trainer.fit(Validated(), loader(), loader(test_texts()))
    (file,) = tmp_path.rglob("influential.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    last = [row for row in rows if row["epoch"] == 1 and row["role"] == "proponent" and row["rank"] == 1]
    result = trainer.influence(loader(test_texts()), method=TracInLayer("hidden"))
    for row in last:
        assert result.proponents(1).indices[row["test_index"], 0] == row["train_index"]
        assert result.proponents(1).values[row["test_index"], 0] == pytest.approx(row["score"], rel=1e-4)


def test_a_resumed_fit_keeps_the_shape_that_was_chosen(tmp_path, monkeypatch):
    """Another first batch, with other words masked, might take another one for smaller."""
    family = FAMILIES["bert-tokens"]

    def fit(epochs, **options):
        trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", dtype="float32", **options)], max_epochs=epochs)
        pl.seed_everything(0, verbose=False)
        trainer.fit(family.build(), family.train_loader(), ckpt_path=tmp_path / "last.ckpt" if epochs > 1 else None)
        return trainer

    fit(1).save_checkpoint(tmp_path / "last.ckpt")
    shapes = [site.shape for site in Trace(tmp_path / "trace").sites]
    assert shapes == ["words", "matrix"]
    with pytest.raises(ValueError, match="Resume with the same arguments"):
        fit(2, projection=(2, 4))
    monkeypatch.setattr(StorageOptions, "applied", lambda options, site, example: site)  # factors
    trainer = fit(2)
    assert [site.shape for site in Trace(tmp_path / "trace").sites] == shapes
    assert len(Trace(tmp_path / "trace").checkpoints) == 2
    assert trainer.influence(family.test_loader(), method="tracin-last").scores.any()
