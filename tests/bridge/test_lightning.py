"""Beside Lightning's own parts: both packages, progress bars, datamodules, precisions, the command line."""

from __future__ import annotations

import copy
import json
import shutil

import lightning.pytorch as twin
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.cli import LightningCLI as TwinCLI
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import CombinedLoader
from tokenizers import Tokenizer, models
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, site_of, test_texts, texts
from transformers import PreTrainedTokenizerFast
from twin_toy import TwinToy

from lightning_tracin import InfluenceTrainerMixin, Trace, TracInCallback, influence
from lightning_tracin.bridge.training_set import TrainingSet


class TwinTrainer(InfluenceTrainerMixin, twin.Trainer):
    """The README's two lines."""


def test_lightning_pytorch_works_by_the_function_and_by_the_mixin(tmp_path):
    module = TwinToy()
    trainer = fitted(tmp_path / "a", copy.deepcopy(module), trainer={"kind": TwinTrainer})
    stock = fitted(tmp_path / "b", module, trainer={"kind": twin.Trainer})
    scores = [trainer.influence(loader(test_texts())).scores, influence(stock, loader(test_texts())).scores]
    assert scores[0].shape == (N_TEST, N_TRAIN)
    torch.testing.assert_close(*scores)


def test_a_stock_trainer_of_pytorch_lightning_works_by_the_function(tmp_path, toy):
    stock = fitted(tmp_path / "trace", trainer={"kind": pl.Trainer})
    expected = toy.influence(loader(test_texts())).scores
    torch.testing.assert_close(influence(stock, loader(test_texts())).scores, expected)


@pytest.mark.parametrize(
    "bar", [lambda: RichProgressBar(console_kwargs={"force_terminal": True}), TQDMProgressBar], ids=["rich", "tqdm"]
)
def test_progress_is_shown_by_the_trainers_own_bar(tmp_path, capsys, bar):
    trainer = quiet(callbacks=[bar(), TracInCallback(tmp_path / "trace")], enable_progress_bar=True)
    trainer.fit(Toy(), loader())
    fit_output = capsys.readouterr()
    trainer.influence(loader(test_texts()))
    output = capsys.readouterr()
    assert "Test gradients 2/2" in output.out + output.err
    if bar is TQDMProgressBar:
        assert "TracIn gradients" in fit_output.out + fit_output.err


@pytest.mark.parametrize(
    "bar",
    [lambda: twin.callbacks.RichProgressBar(console_kwargs={"force_terminal": True}), twin.callbacks.TQDMProgressBar],
    ids=["rich", "tqdm"],
)
def test_progress_bars_of_lightning_pytorch_show_it_too(tmp_path, capsys, bar):
    callbacks = [bar(), TracInCallback(tmp_path / "trace")]
    trainer = quiet(TwinTrainer, callbacks=callbacks, enable_progress_bar=True)
    trainer.fit(TwinToy(), loader(), loader(test_texts()))
    capsys.readouterr()
    trainer.influence(loader(test_texts()))
    output = capsys.readouterr()
    assert "Test gradients 2/2" in output.out + output.err
    assert type(trainer.callbacks[0]) is type(bar())


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_a_datamodule_of_lightning_pytorch(tmp_path, cache):
    class Data(twin.LightningDataModule):
        def train_dataloader(self):
            return loader(shuffle=True)

        def test_dataloader(self):
            return loader(test_texts())

        def on_after_batch_transfer(self, batch, dataloader_idx):
            ids, labels = batch
            return [torch.where(ids > 0, (ids + 3) % 39 + 1, 0), labels]

    trainer = quiet(TwinTrainer, callbacks=[TracInCallback(tmp_path / "trace", cache=cache)])
    trainer.fit(TwinToy(), datamodule=Data())
    scores = trainer.influence(datamodule=trainer.datamodule).scores
    by_loader = trainer.influence(loader(test_texts())).scores
    torch.testing.assert_close(scores, by_loader)
    other = quiet(TwinTrainer).influence(loader(test_texts()), TwinToy(), trace=tmp_path / "trace").scores
    assert not torch.allclose(scores, other)  # without the datamodule's hook the test examples are others


class Shifting(pl.LightningDataModule):
    """Makes the ids on the device, in its own hook, as datamodules that tokenise there do."""

    def __init__(self):
        super().__init__()
        self.setups = 0

    def setup(self, stage):
        self.setups += stage == "fit"

    def train_dataloader(self):
        return loader(shuffle=True)

    def test_dataloader(self):
        return loader(test_texts())

    def on_after_batch_transfer(self, batch, dataloader_idx):
        ids, labels = batch
        return [torch.where(ids > 0, (ids + 3) % 39 + 1, 0), labels]


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_the_hooks_of_a_datamodule_run_in_every_pass(tmp_path, cache):
    def shifted(data):
        ids, labels = Shifting().on_after_batch_transfer(data.tensors, 0)
        return torch.utils.data.TensorDataset(ids, labels)

    expected = fitted(tmp_path / "shifted", data=loader(shifted(texts()), shuffle=True))
    trainer = fitted(tmp_path / "trace", data=Shifting(), cache=cache)
    scores = expected.influence(loader(shifted(test_texts()))).scores
    torch.testing.assert_close(trainer.influence(loader(test_texts())).scores, scores, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(trainer.influence(datamodule=trainer.datamodule).scores, scores, rtol=1e-4, atol=1e-9)
    assert trainer.datamodule.setups == 1  # a second set-up could split the data anew
    other = quiet().influence(datamodule=Shifting(), model=Toy(), trace=tmp_path / "trace")
    torch.testing.assert_close(other.scores, scores, rtol=1e-4, atol=1e-9)


def test_mixed_precision_is_that_of_the_fit(tmp_path, toy):
    trainer = fitted(tmp_path / "trace", trainer={"precision": "bf16-mixed", "max_epochs": 1})
    scores = trainer.influence(loader(test_texts())).scores
    exact = quiet().influence(
        loader(test_texts()), Toy(), trace=recomputed(tmp_path / "trace"), train_dataloaders=loader()
    )
    assert not torch.equal(scores, exact.scores)
    assert (scores - exact.scores).norm() < 0.05 * exact.scores.norm()


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-4), ("bf16-true", 0.1)])
def test_true_precisions(tmp_path, precision, tolerance):
    """Influence runs at the precision of the trainer; the trace holds the weights as they were."""
    trainer = fitted(tmp_path / "trace", trainer={"precision": precision, "max_epochs": 1})
    scores = trainer.influence(loader(test_texts())).scores
    path = recomputed(tmp_path / "trace")
    exact = quiet().influence(loader(test_texts()), Toy(), trace=path, train_dataloaders=loader()).scores
    assert scores.dtype == torch.float32
    assert (scores - exact).norm() < tolerance * exact.norm()


def recomputed(path):
    """The trace without its gradients, so that they are computed again."""
    for folder in (*path.glob("checkpoints/*/words"), *path.glob("checkpoints/*/linear-*")):
        shutil.rmtree(folder)
    return path


def test_validation_beside_it_changes_nothing(tmp_path, toy):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.influence_loss(batch).mean())

    pl.seed_everything(0, verbose=False)
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", dtype="float32")], num_sanity_val_steps=2)
    trainer.fit(Validated(), loader(), loader(test_texts()))
    assert len(Trace(tmp_path / "trace").checkpoints) == 2


def test_loaders_whose_batches_come_as_they_are(tmp_path, toy):
    """The training loader in a CombinedLoader of its own, and test loaders in any container, as for predict."""
    fit = fitted(tmp_path / "trace", data=CombinedLoader(loader(shuffle=True)))
    expected = toy.influence(loader(test_texts())).scores
    for tests in ([loader(test_texts())], {"a": loader(test_texts())}, CombinedLoader({"a": loader(test_texts())})):
        torch.testing.assert_close(fit.influence(tests, train_dataloaders=CombinedLoader(loader())).scores, expected)


def test_a_loader_that_is_made_anew_each_epoch(tmp_path):
    trainer = fitted(tmp_path / "trace", data=Shifting(), trainer={"reload_dataloaders_every_n_epochs": 1})
    once = fitted(tmp_path / "once", data=Shifting())
    scores = [each.influence(loader(test_texts())).scores for each in (trainer, once)]
    torch.testing.assert_close(*scores)


class Reloaded(pl.LightningDataModule):
    """Gives the data sets of the epochs; loaders shuffle."""

    def __init__(self, *sets):
        super().__init__()
        self.sets = sets

    def train_dataloader(self):
        return loader(self.sets[self.trainer.current_epoch], shuffle=True)


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize(
    ("other", "difference"), [(texts(seed=5), "other examples"), (texts(21), "21 examples instead of 20")]
)
def test_a_loader_that_is_made_anew_of_another_data_set(tmp_path, cache, other, difference):
    data = Reloaded(texts(), texts(), other)
    trainer = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}
    with pytest.raises(ValueError, match=f"anew for epoch 2, and its data set has {difference}"):
        fitted(tmp_path / "trace", data=data, cache=cache, trainer=trainer)
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [5, 10]
    assert trace.data_fingerprint == TrainingSet(loader()).fingerprint()


def test_a_loader_that_is_made_anew_of_examples_that_are_drawn_anew(tmp_path):
    class Drawn(torch.utils.data.TensorDataset):
        generator = torch.Generator()

        def __getitem__(self, index):
            ids, label = super().__getitem__(index)
            return torch.where(torch.rand(7, generator=self.generator) < 0.5, ids, 1), label

    data = Reloaded(Drawn(*texts().tensors), Drawn(*texts().tensors))
    fitted(tmp_path / "trace", data=data, trainer={"reload_dataloaders_every_n_epochs": 1})
    assert len(Trace(tmp_path / "trace").checkpoints) == 2


def test_the_search_for_a_learning_rate_leaves_no_trace(tmp_path, monkeypatch):
    class Tunable(Toy):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    monkeypatch.chdir(tmp_path)
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace")], default_root_dir=tmp_path)
    module = Tunable()
    Tuner(trainer).lr_find(module, loader(), num_training=8, update_attr=False)
    assert not (tmp_path / "trace").exists()
    trainer.fit(module, loader())
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert [(each.step, each.learning_rate) for each in checkpoints] == [(5, 0.1), (10, 0.1)]


def test_a_whole_compiled_module_is_unwrapped(toy, trace):
    class Wrapper:
        """What torch.compile returns, as far as it is looked at."""

        def __init__(self, module):
            self._orig_mod = module

    expected = toy.influence(loader(test_texts())).scores
    assert torch.equal(quiet().influence(loader(test_texts()), Wrapper(Toy()), trace=trace).scores, expected)


def test_words_are_those_of_the_tokenizer(tmp_path):
    vocabulary = {"[PAD]": 0, **{f"word{number}": number for number in range(1, 40)}}
    module = Toy()
    module.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "[PAD]")))
    result = fitted(tmp_path / "trace", module).influence(loader(test_texts()))
    words = {word for index in range(N_TRAIN) for word, _ in result.words(0, index)}
    assert words
    assert words <= {f"word{token}" for token in test_texts()[0][0].tolist()}
    assert Trace(tmp_path / "trace").vocabulary[7] == "word7"


def test_words_are_those_that_the_module_says(tmp_path):
    class Speaking(Toy):
        def influence_words(self, batch):
            return [[f"<{token}>" for token in row] for row in batch[0].tolist()]

    result = fitted(tmp_path / "trace", Speaking()).influence(loader(test_texts()))
    words = {word for index in range(N_TRAIN) for word, _ in result.words(0, index)}
    assert words <= {f"<{token}>" for token in test_texts()[0][0].tolist()}


def test_words_of_another_shape_are_refused(tmp_path):
    class Speaking(Toy):
        def influence_words(self, batch):
            return [["one"] for _ in batch[0]]

    with pytest.raises(ValueError, match="must return B lists of T strings"):
        fitted(tmp_path / "trace", Speaking())


@pytest.mark.filterwarnings("ignore")
def test_the_callback_can_be_configured_from_the_command_line(tmp_path, monkeypatch):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(shuffle=True)

    (tmp_path / "fit.yaml").write_text(f"""
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_tracin.TracInCallback
      init_args:
        dirpath: {tmp_path}/trace
        methods: [tracin-we]
        dtype: float32
        top_words: 3
""")
    monkeypatch.chdir(tmp_path)
    LightningCLI(Toy, Data, args=["fit", "--config", str(tmp_path / "fit.yaml")])
    trace = Trace(tmp_path / "trace")
    assert (trace.dtype, [(site.name, site.top_words) for site in trace.sites]) == ("float32", [("tracin-we", 3)])


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_of_lightning_pytorch_takes_the_callback_too(tmp_path, monkeypatch):
    class Data(twin.LightningDataModule):
        def train_dataloader(self):
            return loader(shuffle=True)

    monkeypatch.chdir(tmp_path)
    TwinCLI(
        TwinToy,
        Data,
        args=[
            "fit",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.callbacks+=lightning_tracin.TracInCallback",
            f"--trainer.callbacks.dirpath={tmp_path}/trace",
            "--trainer.callbacks.cache=on_demand",
        ],
    )
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [5]
    assert not trace.checkpoints[0].has_gradients(site_of(trace, "tracin-we"))


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_on_the_command_line_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    callback = {"class_path": "lightning_tracin.TracInCallback", "init_args": {"dtype": "float8"}}
    with pytest.raises(SystemExit):
        LightningCLI(Toy, args=["fit", "--trainer.callbacks", json.dumps([callback])])
    assert "float8" in capsys.readouterr().err
