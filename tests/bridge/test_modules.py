"""Modules as they are written: layers built late, a plain ``self(x)``, hooks of predict, texts drawn at random."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate
from toy import CLASSES, N_TEST, N_TRAIN, VOCABULARY, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import TracInCallback, TracInMixin
from lightning_tracin.gradients.capture import capture
from lightning_tracin.gradients.layers import sites_on_module
from lightning_tracin.gradients.sites import Site

METHODS = ["tracin-we", "tracin-last"]


class Plain(pl.LightningModule):
    """Without the mixin; its training_step calls the module."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixed(TracInMixin, Plain):
    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch[0]), batch[1], reduction="none")


class SetUp(Toy):
    """Builds a layer in each setup, as Lightning's documentation has it."""

    def __init__(self):
        super().__init__()
        del self.head

    def setup(self, stage):
        self.head = nn.Linear(8, CLASSES)


class Configured(Toy):
    """Builds a layer in configure_model."""

    def __init__(self):
        super().__init__()
        self.head = None

    def configure_model(self):
        if self.head is None:
            self.head = nn.Linear(8, CLASSES)


class Predicting(Toy):
    """Writes its predictions in hooks of predict."""

    def on_predict_epoch_start(self):
        self.said = []

    def predict_step(self, batch, batch_idx):
        self.said.append(self(batch[0]).argmax(1))

    def on_predict_epoch_end(self):
        raise AssertionError(f"{len(self.said)} predictions would be written over those of before")


class Normed(Toy):
    """With batch norm, whose statistics SWA renews in an epoch of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids):
        return self.head(self.norm(torch.tanh(self.hidden(self.embedding(ids).sum(1)))))


class AsksTrainer(pl.LightningDataModule):
    """Looks at its trainer when it is set up."""

    def setup(self, stage):
        self.batch_size = 4 * self.trainer.world_size

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def test_dataloader(self):
        return loader(test_texts(), batch_size=self.batch_size)


def masked(rows):
    """A batch in which words give way to another one at random."""
    ids, labels = default_collate(rows)
    return torch.where((torch.rand(ids.shape) < 0.3) & (ids != 0), VOCABULARY - 1, ids), labels


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
@pytest.mark.parametrize("method", METHODS)
def test_a_plain_module_that_calls_itself_scores_as_one_with_the_mixin(tmp_path, method, cache):
    results = []
    for kind in (Plain, Mixed):
        pl.seed_everything(0, verbose=False)
        fit = fitted(tmp_path / kind.__name__, kind(), cache=cache)
        results.append(fit.influence(loader(test_texts()), method=method))
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(results[0].predictions, results[1].predictions)
    assert results[0].predictions.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_setup_builds_anew_have_the_recorded_weights(tmp_path, method):
    fit = fitted(tmp_path / "trace", SetUp())
    first, again = (fit.influence(loader(test_texts()), method=method) for _ in range(2))
    assert torch.equal(first.scores, again.scores)
    assert first.predictions.isfinite().all()
    of_itself = fit.influence(loader(), method=method).scores.diagonal()
    torch.testing.assert_close(fit.self_influence(method=method), of_itself, rtol=1e-3, atol=1e-9)


def test_a_new_module_builds_its_layers_before_it_is_compared(tmp_path):
    expected = fitted(tmp_path / "trace", Configured()).influence(loader(test_texts())).scores
    found = quiet().influence(loader(test_texts()), Configured(), trace=tmp_path / "trace").scores
    torch.testing.assert_close(found, expected)


def test_a_datamodule_knows_the_trainer_that_sets_it_up(tmp_path):
    expected = fitted(tmp_path / "trace").influence(loader(test_texts())).scores
    found = quiet().influence(model=Toy(), datamodule=AsksTrainer(), trace=tmp_path / "trace").scores
    torch.testing.assert_close(found, expected)


def test_hooks_of_the_users_own_predictions_do_not_run(tmp_path):
    fit = fitted(tmp_path / "trace", Predicting(), cache="on_demand")
    assert fit.influence(loader(test_texts())).scores.shape == (N_TEST, N_TRAIN)
    assert not hasattr(fit.lightning_module, "said")


class TimeFirst(Toy):
    """Calls its embedding with time in the first dimension, and leaves padding out."""

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden((self.embedding(ids.T) * (ids.T != 0)[..., None]).sum(0))))


class BatchFirst(Toy):
    def forward(self, ids):
        return self.head(torch.tanh(self.hidden((self.embedding(ids) * (ids != 0)[..., None]).sum(1))))


def test_time_first_is_told_though_the_first_example_is_one_word():
    ids, labels = texts(7, length=7).tensors
    ids[0, 1:] = 0
    found = []
    for kind in (BatchFirst, TimeFirst):
        pl.seed_everything(0, verbose=False)
        module = kind()
        sites = sites_on_module(module, [Site("words", "tracin-we", "embedding", "words")])
        found.append(capture(module.influence_loss, [ids, labels], sites).gradients["words"])
    assert torch.equal(found[0].examples, found[1].examples)
    assert torch.equal(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0].norms, found[1].norms)


def test_a_plain_module_with_time_first_is_asked_for_the_mixin(tmp_path):
    class PlainTimeFirst(Plain):
        def forward(self, ids):
            return self.head(self.embedding(ids.T).mean(0))

    with pytest.raises(ValueError, match=r"PlainTimeFirst calls a layer with time in the first dimension.*TracInMixin"):
        fitted(tmp_path / "trace", PlainTimeFirst())
    assert not (tmp_path / "trace" / "checkpoints").exists()


def test_a_layer_that_all_examples_share_is_told_though_it_has_as_many_rows(tmp_path):
    class ReadingLabels(Plain):
        def forward(self, ids):
            names = self.embedding(torch.arange(1, 13).view(4, 3)).mean(1)  # batches are of 4, too
            return self.embedding(ids).mean(1) @ names.T

    with pytest.raises(ValueError, match=r"positions of shape \(4, 3\) for 4 examples, where the mean .*TracInMixin"):
        fitted(tmp_path / "trace", ReadingLabels(), methods=("tracin-we",))


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_words_that_only_some_passes_saw_still_add_up(tmp_path, cache):
    data = loader(shuffle=True, collate_fn=masked)
    result = fitted(tmp_path / "trace", Toy(), data, cache=cache).influence(loader(test_texts()))
    summed = [
        [sum(term for _, term in result.words(test, train)) for train in range(N_TRAIN)] for test in range(N_TEST)
    ]
    torch.testing.assert_close(torch.tensor(summed), result.scores, rtol=1e-3, atol=1e-3 * float(result.scores.std()))


@pytest.mark.filterwarnings("ignore:No training batch has given finite gradients")
def test_steps_that_overflow_are_no_checkpoint(tmp_path):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24))
    callback = TracInCallback(tmp_path / "trace", cache="training", every_n_train_steps=1)
    fit = quiet(callbacks=[callback], plugins=[precision])
    fit.fit(Toy(), loader(shuffle=True))
    assert 0 < len(callback.trace.checkpoints) < fit.global_step
    assert fit.influence(loader(test_texts())).scores.isfinite().all()


class Limited(Toy):
    """With word vectors that each forward pass shortens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0, max_norm=1.0)


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_training_is_untouched_where_forward_passes_shorten_word_vectors(tmp_path, cache):
    states = []
    for callbacks in ([], [TracInCallback(tmp_path / "trace", cache=cache)]):
        pl.seed_everything(0, verbose=False)
        module = Limited()
        quiet(callbacks=callbacks).fit(module, loader(shuffle=True))
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.filterwarnings("ignore:Normed has batch norm")
@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_the_epoch_in_which_swa_learns_nothing_is_no_checkpoint(tmp_path, cache):
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    callback = TracInCallback(tmp_path / "trace", cache=cache)
    fit = quiet(max_epochs=4, callbacks=[callback, averaging])
    fit.fit(Normed(), loader(shuffle=True))
    steps = len(loader())
    assert [(each.step, len(each.steps)) for each in callback.trace.checkpoints] == [
        (steps * epoch, steps) for epoch in (1, 2, 3, 4)
    ]
