"""Every linear and convolution layer of every family against brute force: all caches, both precisions, one process.

Rates are so small that weights stay where they are, so that the gradients of training are those at the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from brute_force import AdamMoments, BruteForce, relative_error, untie, weight_of, with_bias
from families import FAMILIES, N_TRAIN
from toy import quiet

from lightning_tracin import Trace, TracInCallback, TracInLayer, TracInSum, TracInWE

TOLERANCES = {"float32": 1e-5, "float16": 2e-3}
RUNS = [("checkpoint", "float32"), ("checkpoint", "float16"), ("on_demand", "float32"), ("training", "float32")]
# One of each kind of layer, and of each way to call it; the others are run by `make test-slow`.
QUICK = {
    *("bert-tokens", "lstm-time-first", "cnn", "embedding-called-twice", "images"),
    *("sentence-pairs-without-mixin", "preferences"),
}
# What mixes the examples of a training batch, or is drawn at random in training, has no gradients of its own there.
NOT_IN_TRAINING = {"bert-dropout", "cnn", "without-mixin"}


class Reference:
    """Dense gradients of every layer, one example at a time, at the checkpoints of a trace."""

    def __init__(self, family, names, path: Path) -> None:
        self.sides = []
        for checkpoint in Trace(path).checkpoints:
            module = family.build()
            module.load_state_dict(checkpoint.weights())
            if module.embedding is not None:
                untie(module, module.get_submodule(module.embedding))
            module.eval()
            layers = [module.get_submodule(name) for name in names]
            parameters = [each for layer in layers for each in (layer.weight, layer.bias) if each is not None]
            for parameter in parameters:
                parameter.requires_grad_()
            self.sides.append(
                [
                    self._gradients(module, layers, parameters, batches)
                    for batches in (family.singles(family.test_loader()), family.singles(family.train_loader()))
                ]
            )
        self.names = names

    def _gradients(self, module, layers, parameters, batches):
        found: list[list[torch.Tensor]] = [[] for _ in layers]
        for batch in batches:
            left = iter(torch.autograd.grad(module.loss(batch), parameters))
            for place, layer in enumerate(layers):
                weight = weight_of(layer, next(left))
                found[place].append(with_bias(weight, next(left) if layer.bias is not None else None))
        return [torch.stack(each).double() for each in found]

    def scores(self, name: str, rates, **options) -> torch.Tensor:
        place = self.names.index(name)
        test, train = ([each[side][place] for each in self.sides] for side in (0, 1))
        return BruteForce(rates, test, train).scores(**options)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_layers_are_those_of_brute_force(tmp_path, monkeypatch, name):
    """All at once: in a sum to which each contributes about as much, none can be wrong by much more than the sum is."""
    monkeypatch.setattr("families.EMBEDDING_RATE", 2e-10)
    monkeypatch.setattr("families.OTHER_RATE", 1e-10)
    family, module = FAMILIES[name], FAMILIES[name].build()
    runs = [run for run in RUNS if run[0] != "training" or name not in NOT_IN_TRAINING]
    words = ("tracin-we",) if module.embedding else ()
    methods = {cache: (*words, "*") if cache == "training" else (*words, "tracin-last", "*") for cache, _ in RUNS}
    paths = {run: tmp_path / "-".join(run) for run in runs}
    callbacks = [
        TracInCallback(path, dtype=dtype, cache=cache, methods=methods[cache]) for (cache, dtype), path in paths.items()
    ]
    moments = AdamMoments()
    trainer = quiet(callbacks=[*callbacks, moments], max_epochs=2)
    pl.seed_everything(3, verbose=False)
    trainer.fit(module, family.train_loader())
    layers = [site.layer for site in Trace(paths[RUNS[0]]).sites if not site.has_words]
    reference = Reference(family, layers, paths[RUNS[0]])
    for (cache, dtype), path in paths.items():
        assert {site.layer for site in Trace(path).sites if not site.has_words} == set(layers)
        # a step from zero changes lora_B by all of it, and with it the gradients of lora_A
        known = [layer for layer in layers if cache != "training" or "lora_A" not in layer]
        trained = [layer for layer in known if f"{layer}.weight" in moments.epochs[0]]
        of_adam = {layer: {"second_moments": moments.of(layer, module.get_submodule(layer))} for layer in trained}
        for precondition, options in ((None, {layer: {} for layer in known}), ("adam", of_adam)):
            each = {layer: reference.scores(layer, module.mean_rates(layer), **own) for layer, own in options.items()}
            mix = [(1 + place / len(each)) / float(scores.norm()) for place, scores in enumerate(each.values())]
            expected = sum(factor * scores for factor, scores in zip(mix, each.values(), strict=True))
            method = summed([TracInLayer(layer, precondition=precondition) for layer in each], mix)
            scores = trainer.influence(family.test_loader(), method=method, trace=path).scores
            assert relative_error(scores, expected) < TOLERANCES[dtype], (cache, dtype, precondition)
    if words:  # test_families.py compares those of the first with brute force
        of_words = [
            trainer.influence(family.test_loader(), method=TracInWE(), trace=path).scores for path in paths.values()
        ]
        for (_, dtype), scores in zip(paths, of_words, strict=True):
            assert relative_error(scores, of_words[0].double()) < TOLERANCES[dtype]
    check_options(trainer, family, layers[len(layers) // 2], reference, module)


def summed(parts, mix):
    parts, mix = (parts, mix) if len(parts) > 1 else ([*parts, *parts], [*mix, 0])
    return TracInSum(parts, mix=mix, scales=[1] * len(parts))


def check_options(trainer, family, layer, reference, module) -> None:
    """Self-influence, the strongest, cosines and sums at one of the layers."""
    rates, cosine = module.mean_rates(layer), TracInLayer(layer, normalize="cosine")
    scores = trainer.influence(family.test_loader(), method=cosine).scores
    assert relative_error(scores, reference.scores(layer, rates, normalize="cosine")) < TOLERANCES["float32"]
    plain = trainer.influence(family.test_loader(), method=TracInLayer(layer)).scores
    assert relative_error(plain, reference.scores(layer, rates)) < TOLERANCES["float32"]
    own = trainer.self_influence(method=TracInLayer(layer))
    of_train = trainer.influence(family.train_loader(), method=TracInLayer(layer)).scores
    torch.testing.assert_close(own, of_train.diagonal(), rtol=1e-4, atol=1e-6 * float(own.max()))
    best = trainer.influence(family.test_loader(), method=cosine, k=3).proponents(3)
    torch.testing.assert_close(best.values, scores.topk(3).values)
    if module.embedding:
        words = trainer.influence(family.test_loader(), method=TracInWE(normalize="cosine")).scores
        method = TracInSum((TracInWE(normalize="cosine"), cosine), mix=(1, 0.5), scales=(1, 1))
        result = trainer.influence(family.test_loader(), method=method)
        torch.testing.assert_close(result.scores, words + 0.5 * scores, rtol=1e-4, atol=1e-6 * float(scores.max()))
        for train_index in range(N_TRAIN):
            terms = sum(term for _, term in result.words(1, train_index))
            assert terms == pytest.approx(float(words[1, train_index]), rel=1e-4, abs=1e-5 * float(words.abs().max()))
