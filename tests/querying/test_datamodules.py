"""A datamodule in the place of loaders, as ``trainer.test`` takes one."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as twin
import pytest
import pytorch_lightning as pl
import torch
from toy import Data, Toy, fitted, loader, quiet, test_texts
from twin_toy import TwinToy

from lightning_tracin import InfluenceTrainerMixin, TracInCallback, TracInWE, influence, self_influence


class Shifting(Data):
    """Its hook makes other words of the ids."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        ids, labels = batch
        return [torch.where(ids > 0, (ids + 3) % 39 + 1, 0), labels]


class Speaking(Data):
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=lambda ids: [f"word{each}" for each in ids],
        all_special_ids=[1, 2, 3],
        special_tokens_map={},
    )


class TwinData(twin.LightningDataModule):
    train_dataloader, test_dataloader, batch_size = Data.train_dataloader, Data.test_dataloader, 4


class Untested(pl.LightningDataModule):
    train_dataloader, batch_size = Data.train_dataloader, 4


class Untrained(pl.LightningDataModule):
    test_dataloader = Data.test_dataloader


class TwinTrainer(InfluenceTrainerMixin, twin.Trainer):
    """Of the other package."""


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_it_stands_for_test_and_training_loader(tmp_path, cache):
    trainer = fitted(tmp_path / "trace", data=Shifting(), cache=cache)
    expected = trainer.influence(datamodule=trainer.datamodule).scores
    assert expected.abs().sum() > 0
    own = trainer.self_influence()
    for data in (trainer.datamodule, Shifting()):
        other = fitted(tmp_path / f"{id(data)}", data=Shifting(), cache=cache)
        torch.testing.assert_close(other.influence(data).scores, expected)
    fitted(tmp_path / "elsewhere", data=Shifting(), cache="on_demand")
    fresh = {"model": Toy(), "trace": tmp_path / "elsewhere"}
    torch.testing.assert_close(quiet().self_influence(train_dataloaders=Shifting(), **fresh), own)
    torch.testing.assert_close(quiet().influence(Shifting(), **fresh).scores, expected)
    # its hook is for the batches of loaders that are passed, too
    torch.testing.assert_close(quiet().influence(loader(test_texts()), datamodule=Shifting(), **fresh).scores, expected)


def test_its_tokenizer_serves_in_a_new_process_as_after_the_fit(tmp_path):
    method = TracInWE(exclude_tokens=("special",))
    fit = fitted(tmp_path / "trace", data=Speaking())
    expected = fit.influence(Speaking(), method=method)
    module = Toy()
    found = quiet().influence(Speaking(), model=module, trace=tmp_path / "trace", method=method)
    assert expected.method.exclude_tokens.ids == found.method.exclude_tokens.ids == (1, 2, 3)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.tokenizer is expected.tokenizer is Speaking.tokenizer
    assert not hasattr(module, "tokenizer")
    own = self_influence(fit, method=method)
    training = {"model": module, "datamodule": Speaking(), "trace": tmp_path / "trace"}
    torch.testing.assert_close(self_influence(quiet(), method=method, **training), own)


@pytest.mark.parametrize(("kind", "data", "module"), [(pl.Trainer, Data, Toy), (twin.Trainer, TwinData, TwinToy)])
def test_the_functions_take_those_of_either_lightning(tmp_path, kind, data, module):
    trainer = quiet(kind, callbacks=[TracInCallback(tmp_path / "trace", cache="on_demand")])
    trainer.fit(module(), datamodule=data())
    scores = influence(trainer, data()).scores
    torch.testing.assert_close(scores, influence(trainer, loader(test_texts())).scores)
    torch.testing.assert_close(self_influence(trainer, train_dataloaders=data()), self_influence(trainer))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t: t.influence(Untested()), r"Untested has no test_dataloader.*a loader as dataloaders="),
        (lambda t: t.influence(datamodule=Untested()), "Untested has no test_dataloader"),
        (lambda t: t.influence(Data(), train_dataloaders=Data()), "got one as dataloaders and another as train_data"),
        (lambda t: t.influence(Data(), datamodule=Data()), "got one as datamodule and another as dataloaders"),
        (
            lambda t: t.self_influence(train_dataloaders=Untrained()),
            r"Untrained has no train_dataloader.*as train_data",
        ),
        (lambda t: t.influence(loader(), train_dataloaders=Untrained()), "Untrained has no train_dataloader"),
    ],
)
def test_what_it_lacks_is_named(toy, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(toy)


def test_one_without_training_set_serves_where_gradients_are_stored(toy):
    expected = toy.influence(loader(test_texts())).scores
    torch.testing.assert_close(toy.influence(Untrained()).scores, expected)


def test_the_order_of_arguments_is_told(toy):
    with pytest.raises(
        TypeError,
        match=r"model must be a LightningModule or a Hugging Face model, but got Data.*trainer\.influence\(test_loader",
    ):
        toy.influence(loader(test_texts()), Data())
