"""Rates, and which layers moved, are those of the steps as they were made, whatever comes between our hook and them."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins import MixedPrecision
from toy import STEPS_PER_EPOCH, Toy, fitted, loader, quiet, site_of, test_texts

from lightning_tracin import Trace, TracInCallback


class Measured(Toy):
    """SGD whose rate is found from what each step does to a weight, over its gradient."""

    def __init__(self):
        super().__init__()
        self.used = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        before = self.head.bias.detach().clone()
        optimizer.step(closure=optimizer_closure)
        self.used.append(float(((before - self.head.bias.detach()) / self.head.bias.grad).median()))


def warm_up(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * (step + 1)


class Warm(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        warm_up(optimizer, trainer.global_step)


class WarmHook(Measured):
    def on_before_optimizer_step(self, optimizer):
        warm_up(optimizer, self.global_step)


class WarmClipping(Measured):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        warm_up(optimizer, self.global_step)


@pytest.mark.parametrize(("kind", "others"), [(Measured, [Warm()]), (WarmHook, []), (WarmClipping, [])])
def test_rates_that_later_hooks_set_are_those_that_were_used(tmp_path, kind, others):
    module = kind()
    callbacks = [TracInCallback(tmp_path, on_error="raise", cache="on_demand"), *others]
    quiet(callbacks=callbacks, accumulate_grad_batches=2).fit(module, loader())
    assert module.used == pytest.approx([0.1 * (step + 1) for step in range(6)], rel=1e-3)
    found = [each.learning_rate for each in Trace(tmp_path).checkpoints]
    assert found == pytest.approx([sum(module.used[:3]) / 3, sum(module.used[3:]) / 3], rel=1e-3)


def test_a_layer_whose_gradient_clipping_takes_away_has_not_moved(tmp_path):
    class Freezing(Toy):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if self.current_epoch < 1:
                self.head.weight.grad = self.head.bias.grad = None

    module = Freezing()
    fitted(tmp_path, module, loader())
    first, second = Trace(tmp_path).checkpoints
    site = site_of(first, "tracin-last")
    assert (first.moves(site), second.moves(site)) == (False, True)
    assert first.learning_rate_of(site) == 0.0
    assert first.learning_rate_of(site_of(first, "tracin-we")) > 0.0


def test_an_optimizer_that_clears_its_gradients_in_its_step_moves_its_layers(tmp_path):
    class Clearing(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.zero_grad()
            return loss

    module = Toy()
    module.configure_optimizers = lambda: Clearing(module.parameters(), lr=0.3)
    fit = fitted(tmp_path, module, loader())
    assert [each.learning_rate for each in Trace(tmp_path).checkpoints] == pytest.approx([0.3, 0.3])
    assert fit.influence(loader(test_texts()), method="tracin-last").scores.any()


def test_a_step_that_calls_that_of_its_base_class_is_one(tmp_path):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Raw(Toy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.influence_loss(batch).mean())
            optimizer.step()

        def configure_optimizers(self):
            torch.optim.SGD(self.head.parameters(), lr=0.1)  # an instance of the base makes torch hook its step, too
            return Own(self.parameters(), lr=0.1)

    fitted(tmp_path, Raw(), loader())
    assert [(each.step, len(each.steps)) for each in Trace(tmp_path).checkpoints] == [(5, 5), (10, 5)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_loss_scale_skips_counts_at_no_rate(tmp_path, fused):
    moved = []

    class Scaled(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2, fused=fused)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**-step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def training_step(self, batch, batch_idx):
            overflows = self.training and self.global_step in (0, 3)
            return super().training_step(batch, batch_idx) * (torch.inf if overflows else 1.0)

        def optimizer_step(self, *arguments, **options):
            before = self.head.weight.detach().clone()
            super().optimizer_step(*arguments, **options)
            moved.append(not torch.equal(before, self.head.weight))

    pl.seed_everything(0, verbose=False)
    fit = quiet(
        callbacks=[TracInCallback(tmp_path, on_error="raise", cache="on_demand")],
        plugins=MixedPrecision("bf16-mixed", "cpu"),
        max_epochs=1,
    )
    fit.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    fit.fit(Scaled(), loader())
    assert moved == [False, True, True, False, True]
    (checkpoint,) = Trace(tmp_path).checkpoints
    assert (checkpoint.step, [number for number, *_ in checkpoint.steps]) == (STEPS_PER_EPOCH, [1, 2, 4])
    assert checkpoint.learning_rate == pytest.approx(1e-2 * (2**-1 + 2**-2 + 2**-4) / 3)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_fit_whose_steps_were_all_skipped_says_so(tmp_path):
    class Overflowing(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.inf if self.training else 1.0)

    fit = quiet(
        callbacks=[TracInCallback(tmp_path, cache="on_demand")],
        plugins=MixedPrecision("bf16-mixed", "cpu"),
        max_epochs=1,
    )
    fit.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with pytest.warns(UserWarning, match="No optimizer step of this fit was made"):
        fit.fit(Overflowing(), loader())
    assert not Trace(tmp_path).checkpoints
