"""A task with planted causes: a test example's word has its meaning from a few training examples, and from no other."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset
from toy import Toy, quiet

from lightning_tracin import TracInCallback

COPIES, N_TEST, N_OTHERS, EPOCHS = 4, 4, 40, 6


def planted() -> tuple[TensorDataset, TensorDataset]:
    """Training and test examples: test example i has a word of its own, 30 + i, as training examples 4 i to 4 i + 3.

    The other training examples have other words; all words around these are noise.
    """
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(30, 30 + N_TEST)
    labels = torch.arange(N_TEST) % 2
    keys = torch.cat([own.repeat_interleave(COPIES), torch.randint(20, 30, (N_OTHERS,), generator=generator)])
    train_labels = torch.cat([labels.repeat_interleave(COPIES), torch.arange(N_OTHERS) % 2])
    noise = torch.randint(1, 20, (len(keys), 3), generator=generator)
    test_noise = torch.randint(1, 20, (N_TEST, 3), generator=generator)
    train = TensorDataset(torch.cat([keys[:, None].repeat(1, 3), noise], 1), train_labels)
    return train, TensorDataset(torch.cat([own[:, None].repeat(1, 3), test_noise], 1), labels)


TRAIN, TEST = planted()


class Learner(Toy):
    """The toy, without dropout, at a rate at which it learns a word from four examples."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Identity()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-2)

    def influence_label_names(self):
        return {0: "no", 1: "yes"}


def build(indices, seed):
    return Learner(), DataLoader(Subset(TRAIN, indices), batch_size=8, shuffle=True)


def test_loader() -> DataLoader:
    return DataLoader(TEST, batch_size=3)


test_loader.__test__ = False


def fitted(path, **options):
    """A trainer that has fitted the task, and left a trace."""
    pl.seed_everything(0, verbose=False)
    module, loader = build(range(len(TRAIN)), 0)
    callback = TracInCallback(path, dtype="float32", on_error="raise", **options)
    trainer = quiet(max_epochs=EPOCHS, callbacks=[callback])
    trainer.fit(module, loader)
    return trainer
