"""A ``training_step`` that moves learning rates or weights itself: our looks call it, and training stays what it is."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, SequentialLR
from toy import DECAY, EPOCHS, RATE, STEPS_PER_EPOCH, Toy, fitted, loader, quiet, same_weights, test_texts

from lightning_tracin import Trace

STEPS = EPOCHS * STEPS_PER_EPOCH
NEVER = {"interval": "epoch", "frequency": 10**6}  # it is stepped by hand


class Plain(pl.LightningModule):
    """No mixin: training_step is the loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1])


def of_lightning(module, optimizer):
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decaying(optimizer), **NEVER}}


def held(module, optimizer):
    module.scheduler = decaying(optimizer)
    return optimizer


def in_sequence(module, optimizer):
    module.scheduler = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1, 3), decaying(optimizer)], [4])
    return optimizer


def one_cycle(module, optimizer):
    module.schedulers = {"only": [OneCycleLR(optimizer, 10 * RATE, total_steps=1000)]}
    return optimizer


def decaying(optimizer):
    return LambdaLR(optimizer, lambda step: DECAY**step)


def by_hand(module):
    for group in module.optimizers().param_groups:
        group["lr"] *= DECAY


WAYS = {
    "lr_schedulers": (of_lightning, lambda module: module.lr_schedulers().step()),
    "a held scheduler": (held, lambda module: module.scheduler.step()),
    "in sequence": (in_sequence, lambda module: module.scheduler.step()),
    "momentum too": (one_cycle, lambda module: module.schedulers["only"][0].step()),
    "by hand": (lambda module, optimizer: optimizer, by_hand),
}


def moving(kind, way):
    """A module that moves its learning rate in training_step, and notes it."""
    configure, move = WAYS[way]

    class Moving(kind):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            move(self)
            return loss

        def configure_optimizers(self):
            return configure(self, torch.optim.Adam(self.parameters(), RATE))

        def on_before_optimizer_step(self, optimizer):
            used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))

    used = []
    return Moving(), used


def trained(module, **options):
    pl.seed_everything(0, verbose=False)
    quiet(**options).fit(module, loader(shuffle=True))
    return copy.deepcopy(module.state_dict())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch would have it after the first step
@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Toy, Plain])
def test_training_is_the_same_and_its_rates_are_recorded(tmp_path, kind, way, cache):
    pl.seed_everything(1, verbose=False)
    module, used = moving(kind, way)
    begun = copy.deepcopy(module.state_dict())
    without, rates = trained(module), list(used)
    module, used = moving(kind, way)
    module.load_state_dict(begun)
    fitted(tmp_path / "trace", module, cache=cache)
    assert same_weights(module.state_dict(), without)
    assert used == rates
    assert len({rate for rate, _ in rates}) > STEPS // 2
    steps = [step for checkpoint in Trace(tmp_path / "trace").checkpoints for step in checkpoint.steps]
    assert [step[2][0] for step in steps] == [rate for rate, _ in rates]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_question_moves_no_learning_rate(tmp_path):
    module, _ = moving(Plain, "lr_schedulers")
    trainer = fitted(tmp_path / "trace", module, cache="on_demand")
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    before = optimizer.param_groups[0]["lr"], config.scheduler.last_epoch
    trainer.influence(loader(test_texts()))
    assert (optimizer.param_groups[0]["lr"], config.scheduler.last_epoch) == before


def in_place(teacher, student):
    with torch.no_grad():
        teacher.mul_(0.5).add_(student, alpha=0.5)


def by_data(teacher, student):
    teacher.data.mul_(0.5).add_(student.data, alpha=0.5)


def anew(teacher, student):
    teacher.data = teacher.data * 0.5 + student.data * 0.5


def by_lists(teacher, student):
    with torch.no_grad():
        torch._foreach_lerp_([teacher], [student], 0.5)


def by_out(teacher, student):
    torch.add(teacher.data * 0.5, student.data * 0.5, out=teacher.data.view(-1).view(teacher.shape))


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
@pytest.mark.parametrize("write", [in_place, by_data, anew, by_lists, by_out])
@pytest.mark.parametrize("kind", [Toy, Plain])
def test_a_mean_teacher_learns_from_training_alone(tmp_path, kind, write, cache):
    class Teaching(kind):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(8, 3).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            for teacher, student in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
                write(teacher, student)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), RATE)

    pl.seed_everything(1, verbose=False)
    module = Teaching()
    again = copy.deepcopy(module)
    without = trained(module)
    fitted(tmp_path / "trace", again, cache=cache)
    assert same_weights(again.state_dict(), without)
    assert not torch.equal(again.teacher.weight, again.head.weight)
