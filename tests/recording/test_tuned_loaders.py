"""Loaders that Lightning's tuners make anew, before training and between epochs: examples keep their numbers."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import dense_gradients
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader
from toy import quiet, texts
from unpadded import RATE, Still

from lightning_tracin import Trace, TracInCallback

N = 37  # which no batch size divides


class Data(pl.LightningDataModule):
    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.batch_size = 2
        self.workers = workers

    def train_dataloader(self):
        options = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(texts(N, seed=3), batch_size=self.batch_size, shuffle=True, **options)


class Small(Still):
    """Memory for seven examples."""

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > 7:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)


class Counter(pl.Callback):
    """How many examples an epoch trained on; Lightning gives one whose loader was made anew fewer than there are."""

    def __init__(self) -> None:
        self.drawn = [0, 0, 0]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn[trainer.current_epoch] += len(batch[0])


class AtEpochs(BatchSizeFinder):
    """As Lightning's documentation has it: at the beginning of some epochs."""

    def on_fit_start(self, trainer, pl_module):
        """Not here."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in (0, 1):
            self.scale_batch_size(trainer, pl_module)


def sizes(kind=BatchSizeFinder, mode="power"):
    return kind(mode, steps_per_trial=2, init_val=2, max_trials=4)


def rates():
    return LearningRateFinder(min_lr=1e-12, max_lr=RATE, num_training_steps=5, update_attr=False)


def by_tuner(trainer, module, data):
    Tuner(trainer).scale_batch_size(module, datamodule=data, steps_per_trial=2, init_val=2, max_trials=2)


TUNERS = {
    "power": (Still, lambda ours: [sizes(), ours]),
    "power after ours": (Small, lambda ours: [ours, sizes()]),
    "binary search": (Small, lambda ours: [sizes(mode="binsearch"), ours]),
    "at epochs": (Still, lambda ours: [sizes(AtEpochs), ours]),
    "at epochs after ours": (Still, lambda ours: [ours, sizes(AtEpochs)]),
    "rates": (Still, lambda ours: [rates(), ours]),
    "by a Tuner": (Still, lambda ours: [ours]),
}
QUICK = ("rates", "by a Tuner")


@pytest.mark.filterwarnings("ignore:.*")  # Lightning's, of what its tuners do
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, 0) for name in QUICK),
        pytest.param("power", 1, marks=pytest.mark.slow),
        *(pytest.param(name, 0, marks=pytest.mark.slow) for name in TUNERS if name not in QUICK),
    ],
)
def test_gradients_of_training_are_under_the_numbers_of_their_examples(tmp_path, name, workers):
    pl.seed_everything(0, verbose=False)
    ours = TracInCallback(tmp_path / "trace", cache="training", dtype="float32", on_error="raise")
    kind, callbacks = TUNERS[name]
    counter = Counter()
    trainer = quiet(callbacks=[*callbacks(ours), counter], max_epochs=3, default_root_dir=tmp_path)
    module, data = kind(), Data(workers)
    if name == "by a Tuner":
        by_tuner(trainer, module, data)
    trainer.fit(module, datamodule=data)
    assert (data.batch_size == 2) is (name == "rates")
    trace = Trace(tmp_path / "trace")
    for checkpoint, n_drawn in zip(trace.checkpoints, counter.drawn, strict=True):
        module.load_state_dict(checkpoint.weights())
        singles = DataLoader(texts(N, seed=3), batch_size=1)
        expected = dense_gradients(module, module.embedding, singles, lambda batch: module.influence_loss(batch).sum())
        (stored,) = (checkpoint.gradients(site) for site in trace.sites if site.has_words)
        rows = stored.read(0)
        found = torch.zeros_like(expected)
        found[rows.examples, rows.tokens] = (rows.norms[:, None] * rows.directions).double()
        drawn = rows.examples.unique()
        assert len(drawn) == n_drawn > 0
        torch.testing.assert_close(found[drawn], expected[drawn], rtol=1e-5, atol=1e-8)
