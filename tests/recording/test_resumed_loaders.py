"""Loaders that go on inside an epoch, where a fit that is resumed had left them: torchdata's StatefulDataLoader."""

from __future__ import annotations

from itertools import islice

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader
from toy import N_TRAIN, Toy, loader, quiet, texts

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.recording.sampled_indices import SampledIndices


class Order(pl.Callback):
    """The examples of each training batch, told from their words, which are all different."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        same = (batch[0][:, None] == texts().tensors[0][None]).all(2)
        self.batches.append(same.int().argmax(1).tolist())


class Shuffled:
    """Batches of the user's own, which cannot tell where they are: a loader must skip."""

    def __iter__(self):
        yield from torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(0)).view(5, 4).tolist()

    def __len__(self) -> int:
        return 5


LOADERS = {
    "shuffled": ("training", {"batch_size": 4, "shuffle": True}),
    "own batches": ("checkpoint", {"batch_sampler": Shuffled()}),
    "a worker": ("checkpoint", {"batch_size": 4, "shuffle": True, "num_workers": 1}),
    "some read again": ("training", {"batch_size": 4, "shuffle": True, "num_workers": 1, "snapshot_every_n_steps": 3}),
    "own batches, a worker": ("training", {"batch_sampler": Shuffled(), "num_workers": 1, "snapshot_every_n_steps": 2}),
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata calls
@pytest.mark.parametrize(("cache", "options"), LOADERS.values(), ids=LOADERS)
def test_a_fit_goes_on_with_the_batches_that_were_left(tmp_path, cache, options):
    """Those that it would have had without the callback, and they are what is counted."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def run(folder, callbacks, **resumed):
        pl.seed_everything(0, verbose=False)
        order, module = Order(), Toy()
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet(callbacks=[*callbacks, order, saving], enable_checkpointing=True)
        trainer.fit(module, stateful.StatefulDataLoader(texts(), **options), **resumed)
        return order.batches, module.state_dict()

    def recorded():
        return [TracInCallback(tmp_path / "trace", cache=cache, every_n_train_steps=2, on_error="raise")]

    file = "step=7.ckpt"  # of ten: two batches of the second epoch, and one since the last checkpoint
    whole, _ = run(tmp_path / "plain", [])
    batches, weights = run(tmp_path / "plain", [], ckpt_path=tmp_path / "plain" / file)
    assert batches == whole[7:]
    assert run(tmp_path / "ours", recorded())[0] == whole
    for callbacks in ([], recorded()):  # saved with the callback, and resumed without it, and with it
        again, found = run(tmp_path / "again", callbacks, ckpt_path=tmp_path / "ours" / file)
        assert again == batches
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert [each.step for each in checkpoints] == [2, 4, 6, 8, 10]
    for number, checkpoint in enumerate(checkpoints):
        drawn = {index for batch in whole[2 * number : 2 * number + 2] for index in batch}
        assert torch.nonzero(checkpoint.drawn())[:, 0].tolist() == sorted(drawn)


class Counting(BatchSampler):
    """Its iterations tell where they are, and can be put elsewhere."""

    def __init__(self) -> None:
        self.batch_size = 1

    def __iter__(self):
        return Counted()

    def __len__(self) -> int:
        return N_TRAIN


class Counted:
    def __init__(self) -> None:
        self.next = 0

    def __next__(self):
        self.next += 1
        return [self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_an_iteration_that_is_put_elsewhere():
    sampled = SampledIndices(DataLoader(texts(), batch_sampler=Counting()))
    iteration = iter(sampled)
    next(iteration)
    state = iteration.state_dict()
    assert state == {"next": 1}
    other = iter(sampled)
    next(other)
    iter(sampled)
    other.load_state_dict({"next": 7})
    assert [next(other), next(other)] == [[7], [8]]
    assert sampled.next_batch(other, 1) == [7]
    assert sampled.next_batch(other, 0) == [8]
    assert sampled.next_batch(iteration, 0) == [0]
    assert not hasattr(iter(SampledIndices(loader())), "state_dict")  # which torchdata would take for one that tells


def test_an_iteration_of_which_a_loader_skips_what_a_fit_has_seen():
    sampled = SampledIndices(loader(batch_size=1))
    outer = SampledIndices(sampled.loader)  # another callback's
    skipping = islice(outer, 3, None)
    next(iter(outer))
    assert [next(skipping), next(skipping)] == [[3], [4]]
    for each in (sampled, outer):
        assert each.next_batch(skipping, 1) == [3]
        assert each.next_batch(skipping, 0) == [4]
        with pytest.raises(ValueError, match="had not asked for"):
            each.next_batch(skipping, 0)
        with pytest.raises(ValueError, match="had not asked for"):
            each.next_batch(iter([]), 0)  # an iteration that nobody has watched is not another one


def test_an_iteration_that_has_ended_before_its_batches_came():
    sampled = SampledIndices(loader(batch_size=1))
    outer = SampledIndices(sampled.loader)
    skipping = islice(outer, N_TRAIN - 2, None)
    assert len(list(skipping)) == 2
    next(iter(outer))
    for each in (sampled, outer):
        assert each.next_batch(skipping, 1) == [N_TRAIN - 2]
        list(each)  # as a validation does in between
        assert each.next_batch(skipping, 0) == [N_TRAIN - 1]
