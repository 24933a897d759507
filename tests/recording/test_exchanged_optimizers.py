"""Optimizers and parameter groups that a fit exchanges between two checkpoints: each step counts with its own rates."""

from __future__ import annotations

from math import fsum

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from toy import Toy, fitted, loader, quiet, site_of

from lightning_tracin import Trace, TracInCallback

WORDS, LAST = "embedding.weight", "head.weight"


def sgd(*groups):
    return torch.optim.SGD([{"params": parameters, "lr": rate} for parameters, rate in groups])


def other_groups(trainer, module):
    rest = [*module.hidden.parameters(), *module.head.parameters()]
    trainer.optimizers = [sgd((rest, 0.5), (module.embedding.parameters(), 0.05))]


def in_place(trainer, module):
    (optimizer,) = trainer.optimizers
    optimizer.param_groups = sgd((module.head.parameters(), 0.7), (module.embedding.parameters(), 0.07)).param_groups


def swapped(trainer, module):
    trainer.optimizers = [sgd(([module.head.weight], 0.5), ([module.embedding.weight], 0.05))]


def words_no_more(trainer, module):
    trainer.optimizers = [sgd((module.head.parameters(), 0.2))]


def one_group_more(trainer, module):
    (optimizer,) = trainer.optimizers
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    more = [parameter for parameter in module.parameters() if parameter not in held]
    if more:
        optimizer.add_param_group({"params": more, "lr": 0.03})


def back_and_forth(trainer, module):
    (other_groups if trainer.global_step % 4 == 1 else in_place)(trainer, module)


class Exchanging(Callback):
    """Exchanges before some steps, and sees the rates of all."""

    def __init__(self, exchange, at):
        self.exchange, self.at, self.rates = exchange, at, {WORDS: [], LAST: []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.at:
            trainer.strategy.lr_scheduler_configs = []
            self.exchange(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for name, seen in self.rates.items():
            seen.append(rates.get(pl_module.get_parameter(name), 0.0))


class HeadFirst(Toy):
    def configure_optimizers(self):
        return sgd((self.head.parameters(), 0.4))


class BothApart(Toy):
    def configure_optimizers(self):
        return sgd(([self.embedding.weight], 0.3), ([self.head.weight], 0.1))


def means(seen, bounds):
    return [fsum(seen[first:last]) / (last - first) for first, last in bounds]


def recorded(path):
    checkpoints = Trace(path).checkpoints
    sites = {WORDS: site_of(checkpoints[0], "tracin-we"), LAST: site_of(checkpoints[0], "tracin-last")}
    return {name: [each.learning_rate_of(site) for each in checkpoints] for name, site in sites.items()}


EXCHANGES = {
    "another optimizer": (Toy, other_groups, [3]),
    "in the same optimizer": (BothApart, in_place, [2, 8]),
    "words are left out": (Toy, words_no_more, [6]),
    "words come later": (HeadFirst, other_groups, [4]),
    "a group is added": (HeadFirst, one_group_more, [4]),
    "several times": (BothApart, back_and_forth, [1, 3, 5, 6, 9]),
    "after the last step of a window": (Toy, other_groups, [5]),
}


@pytest.mark.parametrize(("kind", "exchange", "at"), EXCHANGES.values(), ids=EXCHANGES)
def test_each_step_counts_with_its_own_rates(tmp_path, kind, exchange, at):
    seen = Exchanging(exchange, at)
    pl.seed_everything(0, verbose=False)
    callback = TracInCallback(tmp_path / "trace", every_n_train_steps=5, on_error="raise")
    quiet(callbacks=[seen, callback]).fit(kind(), loader(shuffle=True))
    for name, rates in recorded(tmp_path / "trace").items():
        assert rates == pytest.approx(means(seen.rates[name], [(0, 5), (5, 10)])), name


class TwoThenOne(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            self.trainer.optimizers = [sgd((self.parameters(), 0.05))]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.influence_loss(batch).mean())
        for optimizer in self.trainer.strategy._lightning_optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [sgd((self.embedding.parameters(), 0.3)), sgd((self.head.parameters(), 0.1))]


def test_two_optimizers_that_become_one(tmp_path):
    fitted(tmp_path / "trace", TwoThenOne(), trainer={"max_epochs": 1})
    (words,), (last,) = recorded(tmp_path / "trace").values()
    assert words == pytest.approx((3 * 0.3 + 2 * 0.05) / 5)
    assert last == pytest.approx((3 * 0.1 + 2 * 0.05) / 5)


def test_a_resumed_fit_knows_what_was_exchanged_before(tmp_path):
    def fit(**options):
        pl.seed_everything(0, verbose=False)
        seen = Exchanging(swapped, [3])
        files = ModelCheckpoint(tmp_path / "files", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        callback = TracInCallback(tmp_path / "trace", every_n_epochs=2, on_error="raise")
        trainer = quiet(callbacks=[seen, callback, files], enable_checkpointing=True)
        trainer.fit(BothApart(), loader(), **options)
        return seen.rates

    before = {name: rates[:4] for name, rates in fit().items()}
    after = fit(ckpt_path=tmp_path / "files" / "step=4.ckpt", weights_only=False)  # as configured
    for name, rates in recorded(tmp_path / "trace").items():
        assert len(before[name] + after[name]) == 10
        assert rates == pytest.approx(means(before[name] + after[name], [(0, 10)])), name
