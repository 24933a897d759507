"""Fits and queries on a device without float64, as Apple's MPS is: nothing of that type is ever made there."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from elsewhere import DEVICE, Accelerator, TensorsMade, trainer_there
from families import FAMILIES
from pytorch_lightning.loggers import CSVLogger
from toy import Toy, fitted, loader, quiet, test_texts

from lightning_tracin import TracInCallback, TracInLast, TracInSum, TracInWE
from lightning_tracin.scoring.naming import is_constant_on_itself, method_of

METHODS = (
    TracInWE(),
    TracInWE(top_words=3, normalize="cosine"),
    TracInLast(normalize="train"),
    TracInSum((TracInWE(precondition="adam"), TracInLast(precondition="adam"))),
)


def test_the_device_has_no_float64():
    with Accelerator(), TensorsMade():
        assert torch.tensor([1.0], device=DEVICE).float().cpu().tolist() == [1.0]
        for make in (
            lambda: torch.tensor([1.0], device=DEVICE).double(),
            lambda: torch.tensor([1.0]).double().to(DEVICE),
        ):
            with pytest.raises(TypeError, match="no float64"):
                make()


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_a_fit_there_records_what_one_here_does(tmp_path, cache):
    family, scores = FAMILIES["bag-mean"], []
    for place in ("here", "there"):
        accelerator = fit(tmp_path / place, family, trainer_there() if place == "there" else {}, cache)
        assert ("addmm" in accelerator.operations) == (place == "there")
        asked = {"model": family.build(), "trace": tmp_path / place, "train_dataloaders": family.train_loader()}
        scores.append([quiet().influence(family.test_loader(), method=each, **asked).scores for each in METHODS])
    for here, there in zip(*scores, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3 * float(here.abs().max()))


@pytest.mark.parametrize("name", ["bert-answers", "bert-choices", "sentence-pairs-without-mixin"])
def test_fits_of_other_families(tmp_path, name):
    """Their training is not to be relied on there: torch copies some of what it should change in place."""
    fit(tmp_path, FAMILIES[name], trainer_there(), "checkpoint")


def fit(path, family, trainer, cache):
    with Accelerator() as accelerator, TensorsMade():
        callback = TracInCallback(path, cache=cache, dtype="float32", on_error="raise")
        pl.seed_everything(0, verbose=False)
        quiet(max_epochs=1, callbacks=[callback], **trainer).fit(family.build(), family.train_loader())
    return accelerator


class Validated(Toy):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.influence_loss(batch).mean())


# torch takes the parameters for ones without numbers, and leaves them as they are.
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter in the checkpoint to a meta")
@pytest.mark.parametrize("projection", [None, 4, (2, 3)])
def test_queries_projections_and_validations(tmp_path, projection):
    with Accelerator(), TensorsMade():
        options = {**trainer_there(), "max_epochs": 1, "logger": CSVLogger(tmp_path), "limit_val_batches": 1}
        module = Validated()
        module.val_dataloader = lambda: loader(test_texts())
        fit = fitted(tmp_path / "trace", module, trainer=options, projection=projection, log_examples=2)
        for method in METHODS if projection is None else METHODS[:3]:
            assert torch.isfinite(fit.influence(loader(test_texts()), method=method).scores).all()
            assert torch.isfinite(fit.influence(loader(test_texts()), method=method, k=3).proponents(3).values).all()
            if not is_constant_on_itself(method_of(method)):
                assert torch.isfinite(fit.self_influence(method=method)).all()
    assert list(tmp_path.rglob("influential.jsonl"))
