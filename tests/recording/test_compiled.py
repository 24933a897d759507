"""Modules that are compiled, as a whole or in part, score as they do uncompiled, and train as without the callback."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from torch.nn import functional
from toy import fitted, loader, quiet, test_texts, texts
from variants import Plain

from lightning_tracin import TracInMixin

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="hooks need torch.compiler.set_stance"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
RATE = 0.05


class Logging(Plain):
    """Without the mixin; logs and measures. Dynamo cannot trace Lightning's own ``log``."""

    def __init__(self):
        super().__init__()
        self.dropout.p = self.frozen_dropout.p = 0.0

    @torch.compiler.disable
    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


class Mixed(TracInMixin, Logging):
    def influence_loss(self, batch):
        return functional.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1], reduction="none")


class Switched(Logging):
    """One whose training_step was put on the instance."""

    def __init__(self):
        super().__init__()
        self.training_step = super().training_step


def whole(module):
    return torch.compile(module, backend="eager")


def in_place(module):
    module.compile(backend="eager")
    return module


def part(name):
    def compiled(module):
        setattr(module, name, torch.compile(getattr(module, name), backend="eager"))
        return module

    return compiled


COMPILED = {"whole": whole, "in place": in_place, "the head": part("head"), "the words": part("embedding")}


def build(kind):
    torch._dynamo.reset()
    pl.seed_everything(0, verbose=False)
    return kind()


def expected(module, name):
    """By brute force, after one epoch."""
    layer = module.get_submodule(name)
    loss = lambda batch: functional.cross_entropy(module.head(module.embedding(batch[0]).mean(1)), batch[1])  # noqa: E731
    sides = [dense_gradients(module, layer, loader(side, 1), loss) for side in (test_texts(), texts())]
    return BruteForce([RATE], [sides[0]], [sides[1]]).scores()


@pytest.fixture(scope="module")
def uncompiled():
    """What a fit without the callback gives: the module, and what it logged."""
    module = build(Logging)
    trainer = quiet(max_epochs=1)
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, loader())
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("name", "kind", "cache"),
    [
        ("whole", Mixed, "checkpoint"),
        ("the words", Logging, "on_demand"),
        ("in place", Logging, "checkpoint"),
        ("the head", Switched, "checkpoint"),
        *(
            pytest.param(name, kind, cache, marks=pytest.mark.slow)
            for name, kind, cache in (
                *((name, Logging, cache) for name in ("whole", "the head") for cache in ("checkpoint", "on_demand")),
                ("in place", Logging, "on_demand"),
                ("the words", Logging, "checkpoint"),
                ("whole", Switched, "checkpoint"),
                ("the head", Mixed, "checkpoint"),
            )
        ),
    ],
)
def test_a_compiled_module_scores_as_it_does_uncompiled(tmp_path, uncompiled, name, kind, cache):
    fit = fitted(tmp_path, COMPILED[name](build(kind)), loader(), cache=cache, trainer={"max_epochs": 1})
    reference, logged = uncompiled
    weights = {name.replace("_orig_mod.", ""): value for name, value in fit.lightning_module.state_dict().items()}
    assert all(torch.equal(value, weights[name]) for name, value in reference.state_dict().items())
    assert {name: float(value) for name, value in fit.callback_metrics.items()} == logged
    for method, layer in (("tracin-we", "embedding"), ("tracin-last", "head")):
        scores = fit.influence(loader(test_texts()), method=method).scores
        assert relative_error(scores, expected(reference, layer)) < 1e-5


@pytest.mark.parametrize("compile_it", [whole, part("head")], ids=["whole", "the head"])
def test_the_training_cache_cannot_see_into_it(tmp_path, compile_it):
    with pytest.raises(ValueError, match="cannot see into a compiled module"):
        fitted(tmp_path, compile_it(build(Mixed)), loader(), cache="training")
