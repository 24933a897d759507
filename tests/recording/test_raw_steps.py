"""Manual optimization by ``self.optimizers(use_pl_optimizer=False)``, of whose steps Lightning says nothing."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from still_fits import Still
from torch.nn import functional
from toy import DECAY, N_TRAIN, fitted, loader, mean_rate, quiet, same_weights, site_of, test_texts, texts

from lightning_tracin import Trace, TracInCallback

WORD_RATE, RATE = 0.03, 0.01


class Raw(Still):
    """Two optimizers, one of the words; each is asked for as it is told to be, by ``use_pl_optimizer``."""

    wrapped = (False, False)

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.influence_loss(batch).mean())
        for number, wrapped in enumerate(self.wrapped):
            optimizer = self.optimizers(use_pl_optimizer=wrapped)[number]
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers()[number].step()

    def configure_optimizers(self):
        of_layers = [*self.hidden.parameters(), *self.head.parameters()]
        optimizers = [torch.optim.SGD(self.embedding.parameters(), WORD_RATE), torch.optim.SGD(of_layers, RATE)]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(each, lambda step: DECAY**step) for each in optimizers]


class Wrapped(Raw):
    wrapped = (True, True)


class Mixed(Raw):
    wrapped = (True, False)


def build(kind):
    pl.seed_everything(4, verbose=False)
    return kind()


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize("kind", [Raw, Wrapped, Mixed])
def test_rates_steps_and_scores_are_those_of_the_steps(tmp_path, kind, cache):
    """By brute force, at the weights of each checkpoint."""
    fit = fitted(tmp_path, build(kind), loader(), cache=cache)
    checkpoints = Trace(tmp_path).checkpoints
    assert [each.step for each in checkpoints] == [10, 20]
    rates = {"tracin-we": WORD_RATE, "tracin-last": RATE}
    for method, name in (("tracin-we", "embedding"), ("tracin-last", "head")):
        expected_rates = [mean_rate(0, 5, rates[method]), mean_rate(5, 10, rates[method])]
        found = [each.learning_rate_of(site_of(each, method)) for each in checkpoints]
        assert found == pytest.approx(expected_rates)
        sides = [[], []]
        for checkpoint in checkpoints:
            module = build(Raw)
            module.load_state_dict(checkpoint.weights())
            for side, data in zip(sides, (test_texts(), texts()), strict=True):
                loss = lambda batch, module=module: module.influence_loss(batch)[0]  # noqa: E731
                side.append(dense_gradients(module, module.get_submodule(name), loader(data, 1), loss))
        scores = fit.influence(loader(test_texts()), method=method).scores
        assert relative_error(scores, BruteForce(expected_rates, *sides).scores()) < 1e-5


@pytest.mark.parametrize("kind", [Raw, Mixed])
def test_training_is_as_without_the_callback(tmp_path, kind):
    with_it = build(kind)
    trainer = fitted(tmp_path, with_it, loader())
    without = build(kind)
    quiet().fit(without, loader())
    assert same_weights(with_it.state_dict(), without.state_dict())
    assert trainer.global_step == (0 if kind is Raw else 10)
    assert all(not each._optimizer_step_post_hooks for each in trainer.optimizers)


def test_checkpoints_every_few_steps(tmp_path):
    fitted(tmp_path, build(Raw), loader(), every_n_train_steps=4)
    assert [each.step for each in Trace(tmp_path).checkpoints] == [4, 8, 12, 16, 20]


def test_a_layer_that_has_no_gradient_has_rate_0(tmp_path):
    class Frozen(Raw):
        def on_train_epoch_start(self):
            self.embedding.requires_grad_(self.current_epoch > 0)

    fitted(tmp_path, build(Frozen), loader())
    rates = [each.learning_rate_of(site_of(each, "tracin-we")) for each in Trace(tmp_path).checkpoints]
    assert rates == pytest.approx([0.0, mean_rate(5, 10, WORD_RATE)])


def test_a_resumed_fit_and_a_second_one_go_on(tmp_path):
    whole = fitted(tmp_path / "whole", build(Raw), loader(), trainer={"max_epochs": 4})
    expected = whole.influence(loader(test_texts())).scores

    def trainer(epochs):
        callbacks = [TracInCallback(tmp_path / "trace", dtype="float32", on_error="raise")]
        return quiet(callbacks=callbacks, max_epochs=epochs)

    begun = trainer(2)
    begun.fit(build(Raw), loader())
    begun.save_checkpoint(tmp_path / "two.ckpt")  # ModelCheckpoint saves nothing where no step is counted
    begun.fit_loop.max_epochs = 3
    begun.fit(begun.lightning_module, loader())
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [10, 20, 30]
    resumed = trainer(4)
    resumed.fit(build(Raw), loader(), ckpt_path=tmp_path / "two.ckpt")
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [10, 20, 30, 40]
    scores = resumed.influence(loader(test_texts())).scores
    assert scores.shape[1] == N_TRAIN
    torch.testing.assert_close(scores, expected)


def test_an_optimizer_of_which_nothing_is_known_is_named_at_the_end(tmp_path):
    class Own(Raw):
        def training_step(self, batch, batch_idx):
            functional.cross_entropy(self(batch[0]), batch[1]).backward()

    with pytest.warns(UserWarning, match="saw no optimizer step .* that configure_optimizers returned"):
        fitted(tmp_path, build(Own), loader())
