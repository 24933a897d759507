"""Losses that show what they are only on a label that is rarer than what is looked at before training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from toy import Toy, fitted, loader, texts

from lightning_tracin import Trace
from lightning_tracin.bridge.training_set import TrainingSet

N = 130
BATCH = 10
WEIGHT = torch.tensor([1.0, 1.0, 20.0])


def with_a_rare_label() -> tuple[TensorDataset, int]:
    """Two labels, and a third at one example that no check before training looks at."""
    ids, _ = texts(N).tensors
    labels = torch.arange(N) % 2
    rare = next(index for index in range(N) if index not in TrainingSet(loader(TensorDataset(ids, labels))).looked)
    labels[rare] = 2
    return TensorDataset(ids, labels), rare


class Own(Toy):
    """Says what single losses are, and trains their mean."""

    def __init__(self, losses) -> None:
        super().__init__()
        self.dropout.p = 0.0
        self.losses = losses

    def influence_loss(self, batch):
        return self.losses(self(batch[0]), batch[1])


class Plain(Own):
    """Tells nothing but what it trains."""

    influence_loss = None

    def training_step(self, batch, batch_idx):
        return self.losses(self(batch[0]), batch[1]).mean()


class Other(Own):
    """Trains another loss than it says."""

    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch, batch_idx):
        return self.losses(self(batch[0]), batch[1]).mean()


def weighted(logits, labels):
    """By classes, and divided by the sum of the weights, as PyTorch does."""
    losses = functional.cross_entropy(logits, labels, WEIGHT, reduction="none")
    return losses * len(labels) / WEIGHT[labels].sum()


def ignoring(logits, labels):
    """Without one label, and divided by the number of the others, as PyTorch does."""
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=2)
    return losses * len(labels) / (labels != 2).sum()


def honest(logits, labels):
    """By classes, and divided by nothing."""
    return functional.cross_entropy(logits, labels, WEIGHT, reduction="none")


LOSSES = {"class weights": weighted, "ignore_index": ignoring}


@pytest.mark.parametrize(
    ("kind", "loss", "cache"),
    [
        (Own, "class weights", "checkpoint"),
        (Own, "ignore_index", "training"),
        (Own, "class weights", "on_demand"),
        (Plain, "class weights", "training"),
        (Plain, "ignore_index", "checkpoint"),
    ],
)
def test_a_loss_that_depends_on_its_batch_is_found_before_that_batch_trains(tmp_path, kind, loss, cache):
    messages = {Own: r"depend on the batch where its labels hold \[2\]", Plain: "not a mean of independent losses"}
    loss, (data, rare) = LOSSES[loss], with_a_rare_label()
    with pytest.raises(ValueError, match=messages[kind]):
        fitted(tmp_path, kind(loss), loader(data, BATCH), cache=cache, every_n_train_steps=1)
    assert len(Trace(tmp_path).checkpoints) == rare // BATCH  # those before are there


class Single(Own):
    """A single logit, and labels that are no int64."""

    def __init__(self, losses) -> None:
        super().__init__(losses)
        self.head = nn.Linear(8, 1)


def balanced(outputs, labels):
    """By classes, of which the batch says how much each counts."""
    labels = labels.reshape(-1, 1).float()
    weight = (1 + (1 - labels).sum()) / (1 + labels.sum())
    return functional.binary_cross_entropy_with_logits(outputs, labels, pos_weight=weight, reduction="none")[:, 0]


def evenly(outputs, labels):
    return functional.binary_cross_entropy_with_logits(outputs, labels.reshape(-1, 1).float(), reduction="none")[:, 0]


@pytest.mark.parametrize("form", [torch.Tensor.bool, torch.Tensor.float, lambda labels: labels[:, None].float()])
@pytest.mark.parametrize("loss", [balanced, evenly])
def test_labels_of_any_type_are_looked_at(tmp_path, form, loss):
    data, rare = with_a_rare_label()
    data = TensorDataset(data.tensors[0], form(data.tensors[1] == 2))
    if loss is evenly:
        assert len(fitted(tmp_path, Single(loss), loader(data, BATCH)).callbacks[0].trace.checkpoints) == 2
        return
    with pytest.raises(ValueError, match=r"depend on the batch where its labels hold \[1\]"):
        fitted(tmp_path, Single(loss), loader(data, BATCH), every_n_train_steps=1)
    assert len(Trace(tmp_path).checkpoints) == rare // BATCH


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_training_step_that_trains_another_loss_is_found(tmp_path, loss):
    data, _ = with_a_rare_label()
    with pytest.warns(UserWarning, match="what is trained is another loss") as found:
        fitted(tmp_path / "checkpoint", Other(loss), loader(data, BATCH), trainer={"max_epochs": 2})
    assert sum("another loss" in str(each.message) for each in found) == 1
    with pytest.raises(ValueError, match="does not return the mean of influence_loss"):
        fitted(tmp_path / "training", Other(loss), loader(data, BATCH), cache="training")


@pytest.mark.parametrize(("kind", "cache"), [(Own, "checkpoint"), (Other, "training"), (Plain, "on_demand")])
def test_nothing_is_said_of_a_loss_that_does_not(tmp_path, kind, cache):
    loss = honest if kind is Own else lambda logits, labels: functional.cross_entropy(logits, labels, reduction="none")
    data, _ = with_a_rare_label()
    fit = fitted(tmp_path, kind(loss), loader(data, BATCH, shuffle=True), cache=cache)
    assert len(fit.callbacks[0].trace.checkpoints) == 2
