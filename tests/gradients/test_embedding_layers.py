"""Embedding layers of a kind of their own: a word's gradient is that at the output only if rows come out."""

from __future__ import annotations

import pytest
import torch
from still_fits import Still
from torch import nn
from torch.nn import functional
from toy import N_TRAIN, VOCABULARY, fitted, loader, test_texts, texts

from lightning_tracin import TracInWE


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


class Rounded(nn.Embedding):
    """As in training for few bits: rounded forwards, with the gradient of what is not."""

    def forward(self, ids):
        rows = super().forward(ids)
        return rows + ((rows * 64).round() / 64 - rows).detach()


@pytest.mark.parametrize("kind", [Scaled, Rounded])
@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_gradients_are_those_of_the_rows(tmp_path, kind, cache):
    fit = fitted(tmp_path, Net(kind(VOCABULARY, 8)), loader(), cache=cache, trainer={"max_epochs": 1})
    module = fit.lightning_module.eval().double()

    def gradients(data):
        losses = (module.influence_loss((ids[None], label[None])).sum() for ids, label in data)
        return torch.stack([torch.autograd.grad(loss, module.embedding.weight)[0] for loss in losses])

    test, train = gradients(test_texts()), gradients(texts())
    expected = test.flatten(1) @ train.flatten(1).T
    fit.lightning_module.float()
    result = fit.influence(loader(test_texts()), method="tracin-we")
    torch.testing.assert_close(result.scores.double() * 1e12, expected, rtol=1e-4, atol=1e-6)
    terms = {int(word): term * 1e12 for word, term in result.words(0, 1)}
    of_rows = (test[0] * train[1]).sum(1)
    assert terms == pytest.approx({row: float(of_rows[row]) for row in terms}, rel=1e-4, abs=1e-6)
    cosines = fit.influence(loader(test_texts()), method=TracInWE(normalize="cosine")).scores
    norms = [side.flatten(1).norm(dim=1) for side in (test, train)]
    torch.testing.assert_close(cosines.double() * 1e12, expected / norms[0][:, None] / norms[1], rtol=1e-4, atol=1e-6)
