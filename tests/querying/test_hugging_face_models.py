"""A Hugging Face model in the place of the LightningModule that keeps it as ``self.model``."""

from __future__ import annotations

import lightning.pytorch as twin
import pytest
import pytorch_lightning as pl
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from toy import quiet, same_weights

import lightning_tracin
from lightning_tracin import TracInCallback, TracInLast, TracInWE


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """A fit of a LightningModule around BERT, with its data."""
    family = FAMILIES["bert-classes"]
    pl.seed_everything(0, verbose=False)
    trainer = quiet(callbacks=[TracInCallback(tmp_path_factory.mktemp("fit") / "trace", dtype="float32")])
    trainer.fit(family.build(), family.train_loader())
    return trainer, family


@pytest.mark.parametrize("method", [TracInWE(precondition="adam"), TracInLast()], ids=str)
def test_scores_are_those_of_the_module(fit, method):
    trainer, family = fit
    bare = family.build().model
    before = {name: each.clone() for name, each in bare.state_dict().items()}
    found = quiet().influence(family.test_loader(), bare, trace=trainer.callbacks[0].trace, method=method)
    assert torch.equal(found.scores, trainer.influence(family.test_loader(), method=method).scores)
    assert same_weights(before, bare.state_dict())
    assert isinstance(found.label_names, dict)


def test_with_a_trainer_of_the_other_package(fit):
    trainer, family = fit
    found = lightning_tracin.influence(
        quiet(twin.Trainer), family.test_loader(), family.build().model, trace=trainer.callbacks[0].trace
    )
    assert torch.equal(found.scores, trainer.influence(family.test_loader()).scores)


def test_another_model_is_refused_with_the_names_that_differ(fit):
    trainer, family = fit
    other = FAMILIES["bert-binary"].build().model
    with pytest.raises(ValueError, match=r"of another model \(HuggingFace\) than BertFor.*such as model\."):
        quiet().influence(family.test_loader(), other, trace=trainer.callbacks[0].trace)


def test_a_model_of_peft(fit, tmp_path):
    _, family = fit

    def adapted():
        torch.manual_seed(0)
        adapters = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
        return get_peft_model(family.build().model, adapters)

    states = [adapted().state_dict()]
    past = lightning_tracin.Trace.from_checkpoints(
        tmp_path / "past", states, adapted(), family.train_loader(), learning_rates=[1.0], methods=["tracin-we"]
    )
    result = quiet().influence(family.test_loader(), adapted(), trace=past, train_dataloaders=family.train_loader())
    assert result.scores.isfinite().all()
    assert result.scores.any()
