"""Embedding layers of a kind of their own: a word's gradient is that at the output only if rows come out."""

from __future__ import annotations

import pytest
import torch
from still_fits import Still
from torch import nn
from torch.nn import functional
from toy import N_TRAIN, VOCABULARY, fitted, loader, test_texts, texts


class Unit(nn.Embedding):
    def forward(self, ids):
        return functional.normalize(super().forward(ids), dim=-1)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Net(Still):
    def __init__(self, embedding) -> None:
        super().__init__()
        self.embedding = embedding


def hooked():
    layer = nn.Embedding(VOCABULARY, 8)
    layer.register_forward_hook(lambda layer, args, output: output * torch.linspace(0.1, 3, 8))
    return layer


@pytest.mark.parametrize("build", [lambda: Unit(VOCABULARY, 8), hooked], ids=["forward", "hook"])
def test_other_numbers_than_the_rows_are_refused_by_name(tmp_path, build):
    with pytest.raises(ValueError, match=r"is an nn\.Embedding by its class, but its own forward, or a forward hook"):
        fitted(tmp_path, Net(build()))
    fit = fitted(tmp_path / "last", Net(build()), methods=("tracin-last",))  # which does not need the table
    assert fit.influence(loader(test_texts()), method="tracin-last").scores.shape == (6, N_TRAIN)


def test_rows_times_a_constant_have_scores_times_its_square(tmp_path):
    fit = fitted(tmp_path, Net(Scaled(VOCABULARY, 8)), loader(), trainer={"max_epochs": 1})
    module = fit.lightning_module.eval().double()

    def gradients(data):
        losses = (module.influence_loss((ids[None], label[None])).sum() for ids, label in data)
        found = torch.stack([torch.autograd.grad(loss, module.embedding.weight)[0] for loss in losses])
        return found.flatten(1)

    expected = gradients(test_texts()) @ gradients(texts()).T
    fit.lightning_module.float()
    found = fit.influence(loader(test_texts()), method="tracin-we").scores * 1e12
    torch.testing.assert_close(found.double(), expected / 9, rtol=1e-4, atol=1e-6)
