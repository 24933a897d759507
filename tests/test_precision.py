"""Fits that compute in 16 bits, against brute force in full precision at the weights that they recorded."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error, untie
from families import FAMILIES
from test_training_cache import without_dropout
from toy import Toy, fitted, quiet

from lightning_tracin import Trace, TracInCallback

LAYERS = {"tracin-we": "embedding", "tracin-last": "last"}
ROUNDED = 0.05  # relative error of scores whose gradients went through several layers in numbers of 8 bits
NAMES = (
    "bert-binary",
    "bert-regression",
    "bert-tokens",
    "bert-masked",
    "gpt2-causal",
    "t5",
    "lora",
    "lstm",
    "embedding-called-twice",
    "without-mixin",
)


def brute_force(family, path, layer):
    """Scores in double precision, of gradients in single precision."""
    module = family.build()
    (checkpoint,) = Trace(path).checkpoints
    module.load_state_dict(checkpoint.weights())
    untie(module, module.get_submodule(module.embedding))
    of_test, of_train = (
        [dense_gradients(module, module.get_submodule(layer), family.singles(side), module.loss)]
        for side in (family.test_loader(), family.train_loader())
    )
    return BruteForce(module.mean_rates(layer, epochs=1), of_test, of_train).scores()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_about_those_of_full_precision(tmp_path, monkeypatch, name, precision):
    """With every cache: the weights hardly move."""
    monkeypatch.setattr("families.EMBEDDING_RATE", 1e-12)
    monkeypatch.setattr("families.OTHER_RATE", 1e-12)
    family = FAMILIES[name]
    mixes = name == "without-mixin"  # batch norm mixes the examples of a batch in training
    caches = ["checkpoint", "on_demand"] if mixes else ["checkpoint", "on_demand", "training"]
    pl.seed_everything(3, verbose=False)
    trainer = quiet(
        callbacks=[TracInCallback(tmp_path / cache, dtype="float32", cache=cache) for cache in caches],
        max_epochs=1,
        precision=precision,
    )
    trainer.fit(without_dropout(family.build()), family.train_loader())
    for method, layer in LAYERS.items():
        expected = brute_force(family, tmp_path / "checkpoint", getattr(trainer.lightning_module, layer))
        for cache in caches:
            result = trainer.influence(family.test_loader(), trace=tmp_path / cache, method=method)
            assert 0 < relative_error(result.scores, expected) < ROUNDED


class Weighted(Toy):
    """Its loss of a batch is no mean."""

    def training_step(self, batch, batch_idx):
        return (self.influence_loss(batch) * torch.tensor([1.0, 1.5, 1.0, 0.5])).mean()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_loss_that_is_no_mean_is_told_from_one_that_is_rounded(tmp_path, precision):
    options = {"trainer": {"precision": precision}}
    with pytest.raises(ValueError, match="does not return the mean of influence_loss"):
        fitted(tmp_path / "trace", Weighted(), cache="training", **options)
    module = FAMILIES["without-mixin"].build()
    mean = module.loss
    module.loss = lambda batch: mean(batch) * len(batch[0]) ** 0.1
    with pytest.raises(ValueError, match="not a mean of independent losses"):
        fitted(tmp_path / "trace", module, FAMILIES["without-mixin"].train_loader(), **options)
