"""State dicts that change during a fit, or that cannot be stored."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from toy import STEPS_PER_EPOCH, Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInCallback, influence


class Bank(Toy):
    """A memory bank, which each epoch adds to."""

    def __init__(self, persistent=True):
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, 8), persistent=persistent)

    def on_train_epoch_end(self):
        self.bank = torch.cat([self.bank, torch.zeros(4, 8)])


class Late(Toy):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", None)

    def on_train_epoch_end(self):
        self.center = torch.zeros(8)


def seeded(build):
    pl.seed_everything(4, verbose=False)
    return build()


@pytest.mark.parametrize(
    ("build", "changed"),
    [
        (Bank, r"\(bank: shape \(0, 8\) then, shape \(4, 8\) now\).*persistent=False"),
        (Late, r"\(center: none then, shape \(8,\) now\).*persistent=False"),
    ],
)
def test_a_state_dict_that_changes_ends_the_recording_by_name_and_what_was_stored_serves(tmp_path, build, changed):
    one = fitted(tmp_path / "one", seeded(Toy), loader(), trainer={"max_epochs": 1})
    expected = one.influence(loader(test_texts()))
    with pytest.warns(UserWarning, match=f"stopped recording at step {2 * STEPS_PER_EPOCH}.*{changed}"):
        fitted(tmp_path / "trace", seeded(build), loader(), on_error="warn", trainer={"max_epochs": 3})
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [STEPS_PER_EPOCH]
    found = influence(quiet(), loader(test_texts()), build(), train_dataloaders=loader(), trace=trace)
    torch.testing.assert_close(found.scores, expected.scores)


def test_pruning_in_the_fit_is_refused_by_name(tmp_path):
    pruning = ModelPruning("l1_unstructured", amount=0.3)
    fit = quiet(callbacks=[pruning, TracInCallback(tmp_path, on_error="raise")])
    with pytest.raises(ValueError, match=r"embedding.weight: shape \(40, 8\) then, none now.*ModelPruning"):
        fit.fit(Toy(), loader())


def test_a_buffer_that_is_not_in_the_state_dict_may_grow(tmp_path):
    fit = fitted(tmp_path, Bank(persistent=False), loader())
    assert fit.influence(loader(test_texts())).scores.any()
