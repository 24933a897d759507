"""State dicts that change during a fit, or that cannot be stored."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from pytorch_lightning.callbacks import ModelPruning
from toy import STEPS_PER_EPOCH, Toy, fitted, loader, mean_rate, quiet, test_texts, texts

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


class Graph(Toy):
    """With the sparse adjacency matrix of a graph."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("adjacency", 2 * torch.eye(8).to_sparse(), persistent=persistent)

    def forward(self, ids):
        words = (ids != 0).sum(1, keepdim=True)
        summed = torch.sparse.mm(self.adjacency, self.embedding(ids).sum(1).T).T
        return self.head(self.dropout(torch.tanh(self.hidden(summed / words))))


def test_a_sparse_buffer_is_refused_by_name_and_serves_outside_of_the_state_dict(tmp_path):
    with pytest.raises(ValueError, match=r"^adjacency in the module's state dict is no dense.*persistent=False"):
        fitted(tmp_path / "refused", Graph(persistent=True), loader(), on_error="warn")
    assert not (tmp_path / "refused" / "trace.json").exists()
    fit = fitted(tmp_path / "trace", Graph(persistent=False), loader())
    scores = fit.influence(loader(test_texts())).scores
    sides = [[], []]
    for checkpoint in Trace(tmp_path / "trace").checkpoints:
        module = Graph(persistent=False).eval()
        module.load_state_dict(checkpoint.weights())
        for side, data in zip(sides, (test_texts(), texts()), strict=True):
            loss = lambda batch, module=module: module.influence_loss(batch)[0]  # noqa: E731
            side.append(dense_gradients(module, module.embedding, loader(data, 1), loss))
    assert relative_error(scores, BruteForce([mean_rate(0, 5), mean_rate(5, 10)], *sides).scores()) < 1e-5
