"""Fits that train another loss than the one that scores are of are warned of, and no others."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from families import CLASSES, HuggingFace, bert_classifier, classes, labelled_texts
from still_fits import Still, build
from torch.nn import functional
from toy import fitted, loader, texts

from lightning_tracin.bridge.training_set import TrainingSet

WEIGHT = torch.tensor([1.0, 5.0, 20.0])


class Training(Still):
    """Trains what it is told to."""

    loss = None

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)


def focal(module, ids, labels):
    losses = functional.cross_entropy(module(ids), labels, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


OTHERS = {
    "class weights": lambda module, ids, labels: functional.cross_entropy(module(ids), labels, weight=WEIGHT),
    "label smoothing": lambda module, ids, labels: functional.cross_entropy(module(ids), labels, label_smoothing=0.1),
    "focal": focal,
    "a sum": lambda module, ids, labels: functional.cross_entropy(module(ids), labels, reduction="sum"),
    "a further term": lambda module, ids, labels: (
        functional.cross_entropy(module(ids), labels) + 0.01 * module.head.weight.square().sum()
    ),
}


def trained(loss, kind=Training):
    module = build(kind)
    module.loss = lambda ids, labels: loss(module, ids, labels)
    return module


def losses_on_first(module):
    """What training_step and influence_loss say of the examples that are looked at."""
    indices = TrainingSet(loader()).first_indices
    ids, labels = texts()[indices]
    module.eval()
    with torch.no_grad():
        return float(module.loss(ids, labels)), float(module.influence_loss((ids, labels)).mean())


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_both_numbers_are_told(tmp_path, loss, cache):
    with pytest.warns(UserWarning, match="mean of influence_loss") as found:
        fitted(tmp_path, trained(loss), cache=cache)
    (message,) = (str(each.message) for each in found if "influence_loss" in str(each.message))
    told = re.search(r"On 4 .* a loss of (\S+), but the mean of influence_loss is (\S+): .*Scores are of", message)
    assert [float(each) for each in told.groups()] == pytest.approx(losses_on_first(trained(loss)), rel=1e-4)


class Bert(HuggingFace):
    """The mixin's default, of a model as it is before training: all classes are as likely."""

    loss = None

    def training_step(self, batch, batch_idx):
        return self.loss(lambda ids: self.model(**batch).logits, None, batch["labels"])


def bert(loss, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = bert_classifier(num_labels=CLASSES, module=Bert, initializer_range=0.02, **options)
    module.loss = loss
    return module


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
@pytest.mark.parametrize("name", ["class weights", "label smoothing", "focal"])
def test_the_default_of_a_new_model_is_compared_by_gradients_too(tmp_path, name, cache):
    data = loader(labelled_texts(classes), batch_size=8)
    with pytest.warns(UserWarning, match="what is trained is another loss") as found:
        fitted(tmp_path, bert(OTHERS[name]), data, cache=cache, trainer={"max_epochs": 1})
    (message,) = (str(each.message) for each in found if "influence_loss" in str(each.message))
    if name == "label smoothing":  # which makes the gradient of a uniform prediction shorter by that much
        norms = re.search(r"the norm (\S+) by the one and (\S+) by the other", message)
        assert float(norms[1]) == pytest.approx(0.9 * float(norms[2]), rel=0.02)


def test_the_default_of_a_new_model_that_trains_it_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        fitted(tmp_path, bert(mean), loader(labelled_texts(classes)), trainer={"max_epochs": 1})


def test_with_the_training_cache_it_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not return the mean of influence_loss"):
        fitted(tmp_path, trained(OTHERS["class weights"]), cache="training")


def mean(module, ids, labels):
    return functional.cross_entropy(module(ids), labels)


def noisy(module, ids, labels):
    return mean(module, ids, labels) * torch.rand(())


def needing_a_fit(module, ids, labels):
    assert module.trainer.optimizers[0].param_groups, "no optimizer yet"
    if not module.trainer.global_step and not module.training:
        raise RuntimeError("not in training")
    return 2 * mean(module, ids, labels)


class Noisy(Training):
    def influence_loss(self, batch):
        return super().influence_loss(batch) * torch.rand(())


class Without(Training):
    influence_loss = None


class Rounded(Training):
    def influence_loss(self, batch):
        return super().influence_loss(batch) * 1.0005


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(mean, Training), (noisy, Training), (needing_a_fit, Training), (mean, Noisy), (mean, Without), (mean, Rounded)],
    ids=["mean", "noisy", "needing a fit", "noisy influence", "without", "rounded"],
)
def test_what_is_the_same_or_cannot_be_told_is_not_warned_of(tmp_path, loss, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        fitted(tmp_path, trained(loss, kind))


def test_half_precision_is_given_room(tmp_path):
    class Near(Training):
        def influence_loss(self, batch):
            return super().influence_loss(batch) * 1.02

    with pytest.warns(UserWarning, match="influence_loss"):
        fitted(tmp_path / "a", trained(mean, Near))
    fitted(tmp_path / "b", trained(mean, Near), trainer={"precision": "bf16-mixed"})


def test_a_module_with_a_generator_of_its_own_is_left_alone(tmp_path):
    """Calling its training_step would move the generator, and so change what is trained."""

    class Drawing(Training):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def training_step(self, batch, batch_idx):
            scale = torch.rand((), generator=self.generator)
            return self.influence_loss(batch).mean() * scale

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                self.at_start = self.generator.get_state()

    module = build(Drawing)
    before = module.generator.get_state()
    fitted(tmp_path / "trace", module, trainer={"max_epochs": 1})
    assert torch.equal(module.at_start, before)
    assert not torch.equal(module.generator.get_state(), before)
