"""Trainings whose own gradients cannot be taken for those of the examples."""

from __future__ import annotations

import pytest
import torch
from still_fits import Still, build
from torch import nn
from torch.utils.data import IterableDataset, default_collate
from toy import CLASSES, N_TRAIN, fitted, loader, quiet, texts
from variants import Stepping

from lightning_tracin import Trace, TracInCallback


class Stream(IterableDataset):
    def __len__(self):
        return N_TRAIN

    def __iter__(self):
        return iter([texts()[i] for i in range(N_TRAIN)])


class Summed(Still):
    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).sum()


class Weighted(Still):
    def training_step(self, batch, batch_idx):
        return (self.influence_loss(batch) * torch.tensor([1.0, 2.0, 1.0, 1.0])[: len(batch[1])]).mean()


class CompiledPart(Still):
    def __init__(self):
        super().__init__()
        self.head = torch.compile(nn.Linear(8, CLASSES))


REFUSED = {
    "stream": (Still, lambda: loader(Stream()), "a Stream has no sampler"),
    "summed": (Summed, loader, "does not return the mean of influence_loss.*a sum"),
    "weighted": (Weighted, loader, "batch's example 1 the norm"),
    "optimized by hand": (Stepping, loader, "optimizes manually"),
    "compiled": (CompiledPart, loader, "compiled module"),
}


@pytest.mark.parametrize(("module", "data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused_before_training(tmp_path, module, data, message):
    with pytest.raises(ValueError, match=rf'(?s){message}.*cache="checkpoint"'):
        fitted(tmp_path / "trace", build(module), data(), cache="training", methods=("tracin-we",))
    assert not (tmp_path / "trace" / "trace.json").exists()


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="in_order is of torch 2.6")
def test_a_loader_that_does_not_keep_the_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="in_order=True"):
        fitted(tmp_path / "trace", build(), loader(in_order=False), cache="training")


def test_a_collate_function_that_drops_an_example(tmp_path):
    def dropping(items):
        return default_collate(items[:3] if torch.equal(items[0][0], texts()[4][0]) else items)

    with pytest.raises(ValueError, match=r"batch of 4 examples a layer was called on 3 of them: the collate"):
        fitted(tmp_path / "trace", build(), loader(collate_fn=dropping), cache="training")


class Sorted(torch.utils.data.Dataset):
    """The texts, those of one class after those of another, so that the first eight have one label."""

    def __init__(self):
        self.order = texts().tensors[1].argsort()

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        return texts()[self.order[index]]


class ByClass(Still):
    """Weighs its classes."""

    def training_step(self, batch, batch_idx):
        weight = torch.tensor([1.0, 5.0, 20.0])
        return nn.functional.cross_entropy(self(batch[0]), batch[1], weight=weight)


class PlainByClass(ByClass):
    influence_loss = None


class NewHead(Summed):
    """A sum, with a head that is zero, so that all gradients behind it are."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


class PlainNewHead(NewHead):
    influence_loss = None
    training_step = ByClass.training_step


@pytest.mark.parametrize("kind", [ByClass, PlainByClass, NewHead, PlainNewHead])
def test_a_weighted_loss_is_found_where_the_first_examples_or_a_new_head_do_not_show_it(tmp_path, kind):
    with pytest.raises(ValueError, match=r"does not return the mean of influence_loss|is not a mean of independent"):
        fitted(tmp_path, build(kind), loader(Sorted(), batch_size=8), cache="training", methods=("tracin-we",))


def test_a_second_callback_that_takes_from_training_is_refused(tmp_path):
    callbacks = [TracInCallback(tmp_path / name, cache="training") for name in "ab"]
    with pytest.raises(ValueError, match='one TracInCallback with cache="training"'):
        quiet(callbacks=callbacks).fit(build(), loader())
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_not_finite_names_the_example(tmp_path):
    class Diverging(Still):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            late = self.training and self.trainer.global_step >= 5
            return losses * torch.where((batch[0] == texts()[13][0]).all(1) & late, torch.nan, 1.0)

    with pytest.raises(ValueError, match="gradient of training example 13 became NaN"):
        fitted(tmp_path / "trace", build(Diverging), cache="training")
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5]
