"""Losses that depend on the step or the epoch: everyone who asks sees those of the checkpoint."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import dense_gradients, relative_error
from logged_fits import Validated, assert_scores, fit, logged
from torch import nn
from torch.nn import functional
from toy import EPOCHS, STEPS_PER_EPOCH, fitted, loader, quiet, test_texts, texts
from variants import Reproducible

from lightning_tracin import Trace


def counted(step, epoch):
    """What a loss is multiplied by."""
    return min(1.0, (step + 1) / 8) * (epoch + 2)


class Annealed(Reproducible):
    def influence_loss(self, batch):
        return super().influence_loss(batch) * counted(self.global_step, self.current_epoch)


class PlainAnnealed(pl.LightningModule):
    """No mixin: training_step is the loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        return loss * counted(self.trainer.global_step, self.trainer.current_epoch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def brute(trace, kind):
    """Scores, and self-influence, by dense gradients in double precision of the loss at each checkpoint's step."""
    scores, own = 0, 0
    for checkpoint in trace.checkpoints:
        module = kind()
        module.load_state_dict(checkpoint.weights())
        module.double()
        times = counted(checkpoint.step, checkpoint.epoch)

        def loss(batch, module=module, times=times):
            return functional.cross_entropy(module(batch[0]), batch[1]) * times

        sides = [loader(data, batch_size=1) for data in (test_texts(), texts())]
        test, train = (dense_gradients(module, module.embedding, side, loss) for side in sides)
        train[[] if checkpoint.drawn() is None else ~checkpoint.drawn()] = 0  # not trained on since the one before
        scores += checkpoint.learning_rate * torch.einsum("iab,jab->ij", test, train)
        own += checkpoint.learning_rate * torch.einsum("iab,iab->i", train, train)
    return scores, own


def now(trainer):
    return trainer.global_step, trainer.current_epoch


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 3}], ids=["epochs", "steps"])
@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize("kind", [Annealed, PlainAnnealed])
def test_all_answers_are_of_the_checkpoints_step(tmp_path, kind, cache, options):
    trainer = fitted(tmp_path / "trace", kind(), cache=cache, **options)
    trace = Trace(tmp_path / "trace")
    scores, own = brute(trace, kind)
    assert now(trainer) == (EPOCHS * STEPS_PER_EPOCH, EPOCHS)
    assert relative_error(trainer.influence(loader(test_texts())).scores, scores) < 1e-5
    assert relative_error(trainer.self_influence(), own) < 1e-5
    assert now(trainer) == (EPOCHS * STEPS_PER_EPOCH, EPOCHS)
    other = quiet()
    assert relative_error(other.influence(loader(test_texts()), kind(), trace=trace).scores, scores) < 1e-5
    assert now(other) == (0, 0)


def test_the_checkpoints_step_is_what_training_says_when_it_is_taken(tmp_path):
    seen = []

    class Seeing(Annealed):
        def on_train_epoch_end(self):
            seen.append(now(self))

    fitted(tmp_path / "trace", Seeing(), cache="on_demand")
    assert [(each.step, each.epoch) for each in Trace(tmp_path / "trace").checkpoints] == seen


def test_the_trainer_has_its_step_again_after_an_error(tmp_path):
    class Failing(Annealed):
        def influence_loss(self, batch):
            if not self.training and self.global_step == STEPS_PER_EPOCH:
                raise RuntimeError("of this step")
            return super().influence_loss(batch)

    trainer = fitted(tmp_path / "trace", Failing(), cache="on_demand")
    with pytest.raises(RuntimeError, match="of this step"):
        trainer.influence(loader(test_texts()))
    assert now(trainer) == (EPOCHS * STEPS_PER_EPOCH, EPOCHS)


def test_a_validation_is_explained_by_the_same_losses(tmp_path):
    class AnnealedAndValidated(Annealed, Validated):
        pass

    trainer = fit(tmp_path, AnnealedAndValidated(), log_examples=3, log_k=2)
    last = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    assert_scores(last, brute(Trace(tmp_path / "trace"), Annealed)[0], k=2)
