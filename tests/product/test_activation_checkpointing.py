"""Modules that compute parts again in the backward pass find what they find without, with every cache."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from families import CLASSES, FAMILIES, bert_classifier, classes, labelled_texts, lora
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from toy import N_TRAIN, Toy, fitted, loader, test_texts, texts

from lightning_tracin.retraining import Retrainings, without
from lightning_tracin.retraining.folder import Retraining

METHODS = ("tracin-we", "tracin-last")
CACHES = ("checkpoint", "training", "on_demand")


class Scaled(Toy):
    """Does something with the last layer's output, for which that is computed again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((CLASSES,), 2.0))

    def forward(self, ids):
        return super().forward(ids) * self.scale


class Frozen(Scaled):
    """Trains its scale alone, so that no layer's output needs a gradient but for us."""

    def __init__(self):
        super().__init__()
        for layer in (self.embedding, self.hidden, self.head):
            layer.requires_grad_(False)


KINDS = (Toy, Scaled, Frozen)


def whole(kind):
    """The forward pass is one checkpoint."""

    class Whole(kind):
        def forward(self, ids):
            return checkpoint(super().forward, ids, use_reentrant=False)

    return Whole()


def wrapped(kind):
    """Each layer is wrapped, as FSDP users do it."""
    module = kind()
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, nn.Linear | nn.Embedding))
    return module


class InParts(Toy):
    """The hidden and the last layer are checkpoints of their own."""

    reentrant = False

    def forward(self, ids):
        words = (ids != 0).sum(1, keepdim=True)
        read = self.embedding(ids).sum(1) / words
        hidden = checkpoint(
            lambda read: self.dropout(torch.tanh(self.hidden(read))), read, use_reentrant=self.reentrant
        )
        return checkpoint(self.head, hidden, use_reentrant=self.reentrant)


class InPartsOfTraining(InParts):
    """As transformers has it: in eval mode nothing is a checkpoint, so that these may be reentrant."""

    reentrant = True

    def forward(self, ids):
        return super().forward(ids) if self.training else Toy.forward(self, ids)


def found(path, module, cache, train=None, test=None):
    """Scores by both methods, and predictions."""
    trainer = fitted(path, module, train, cache=cache)
    results = [trainer.influence(loader(test_texts()) if test is None else test, method=method) for method in METHODS]
    return [*(result.scores for result in results), results[0].predictions]


WAYS = {
    "in parts": (Toy, InParts),
    "in parts of training": (Toy, InPartsOfTraining),
    **{f"{way.__name__} {kind.__name__}": (kind, partial(way, kind)) for way in (whole, wrapped) for kind in KINDS},
}


@pytest.mark.parametrize("cache", ["checkpoint", "training", pytest.param("on_demand", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("plain", "checkpointing"), WAYS.values(), ids=WAYS)
def test_scores_and_predictions_are_those_without_checkpoints(tmp_path, plain, checkpointing, cache):
    sides = []
    for build in (plain, checkpointing):
        pl.seed_everything(5, verbose=False)
        sides.append(found(tmp_path / str(len(sides)), build(), cache))
    for expected, again in zip(*sides, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-12)


def test_a_retrained_module_says_its_classes_where_parts_are_computed_again(tmp_path):
    """Nothing of it but what comes after the last layer is trained."""

    said = []
    for make in (Frozen, partial(whole, Frozen)):

        def build(indices, seed, make=make):
            return make(), loader(Subset(texts(), indices), shuffle=True)

        runs = Retrainings(tmp_path / str(len(said)), build, loader(test_texts()), n_train=N_TRAIN, trainer=1)
        (outcome,) = runs.run_each([Retraining(without(N_TRAIN, [0]), 0)])
        said.append(outcome.log_probabilities)
    torch.testing.assert_close(said[1], said[0])


TRANSFORMERS = {
    "bert": lambda: bert_classifier(num_labels=CLASSES, dropout=0.1),
    "gpt2": FAMILIES["gpt2-causal"].module,
    "lora": lora,
}


@pytest.mark.parametrize(
    ("reentrant", "cache"),
    [
        (False, "training"),
        (True, "checkpoint"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((False, "checkpoint"), (True, "training"))),
    ],
)
@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.slow), "lora"])
def test_gradient_checkpointing_of_transformers(tmp_path, name, reentrant, cache):
    examples = FAMILIES["gpt2-causal"].examples if name == "gpt2" else labelled_texts(classes)
    sides = []
    for checkpoints in (False, True):
        pl.seed_everything(5, verbose=False)
        module = TRANSFORMERS[name]()
        if checkpoints:
            module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if name == "lora":  # reentrant checkpoints need it where the embedding is frozen
            module.model.enable_input_require_grads()
        train = DataLoader(examples[:17], batch_size=5, shuffle=True)
        sides.append(found(tmp_path / str(checkpoints), module, cache, train, DataLoader(examples[17:], batch_size=2)))
    for expected, again in zip(*sides, strict=True):
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-12, equal_nan=True)
    assert all(expected.abs().sum() > 0 for expected in sides[0][:2])


@pytest.mark.parametrize("cache", CACHES)
def test_reentrant_checkpoints_are_refused_before_training(tmp_path, cache):
    class Reentrant(InParts):
        reentrant = True

    with pytest.raises(ValueError, match="use_reentrant=True, where gradients of examples cannot be taken"):
        fitted(tmp_path / "trace", Reentrant(), cache=cache)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):  # PyTorch says it well
        fitted(tmp_path / "trace", Reentrant(), cache=cache, methods=("tracin-we",))
    assert not (tmp_path / "trace").exists()


def test_a_layer_inside_of_a_reentrant_checkpoint(tmp_path):
    class Reading(Toy):
        def forward(self, ids):
            start = torch.zeros(8, requires_grad=True)
            read = checkpoint(lambda start: self.embedding(ids).sum(1) + start, start, use_reentrant=True)
            return self.head(read)

    with pytest.raises(ValueError, match="of a checkpoint with use_reentrant=True"):
        fitted(tmp_path / "trace", Reading(), methods=("tracin-we",))
