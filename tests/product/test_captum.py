"""Against captum's TracInCP, an independent implementation of Pruthi et al. 2020."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from brute_force import relative_error
from captum.influence import TracInCP
from families import FAMILIES
from torch import nn

from lightning_tracin import Trace, TracInCallback, Trainer


@pytest.fixture(scope="module", params=["cnn", "lstm", "embedding-called-twice"])
def fitted(request, tmp_path_factory):
    family = FAMILIES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "trace"
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TracInCallback(path, dtype="float32")],
    )
    pl.seed_everything(3, verbose=False)
    module = family.build()
    trainer.fit(module, family.train_loader())
    return family, module, trainer, Trace(path)


def captums_scores(family, layer, trace, rates):
    """Captum loads a checkpoint by a function that returns its learning rate, and multiplies the products by it."""
    module = family.build().eval()
    checkpoints = list(zip(trace.checkpoints, rates, strict=True))

    def load(network: nn.Module, checkpoint) -> float:
        recorded, rate = checkpoint
        module.load_state_dict(recorded.weights())
        return rate

    tracin = TracInCP(
        module.network,
        family.singles(family.train_loader()),
        checkpoints,
        checkpoints_load_func=load,
        layers=[layer.removeprefix("network.")],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
    )
    return tracin.influence(family.singles(family.test_loader()))


@pytest.mark.parametrize("method", ["tracin-we", "tracin-last"])
def test_scores_are_those_of_captum(fitted, method):
    family, module, trainer, trace = fitted
    layer = module.embedding if method == "tracin-we" else module.last
    expected = captums_scores(family, layer, trace, module.mean_rates(layer)).double()
    assert relative_error(trainer.influence(family.test_loader(), method=method).scores, expected) < 1e-5
