"""Attention masks tell padding, in whatever the batch holds them, and in either of the two ways to write one."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import pytorch_lightning as pl
import torch
from brute_force import dense_gradients, relative_error
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from toy import quiet

from lightning_tracin import TracInCallback, TracInMixin
from lightning_tracin.gradients.attention_masks import attended_ids, attended_tokens

IDS = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])
MASK = (IDS != 0).long()
LABELS = torch.tensor([0, 1])
Texts = namedtuple("Texts", "input_ids attention_mask labels")
MAPPING = {"input_ids": IDS, "attention_mask": MASK}


@dataclass
class Batch:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


BATCHES = [
    MAPPING,
    UserDict(MAPPING),
    (MAPPING, LABELS),
    [LABELS, MAPPING],
    {"text": MAPPING, "labels": LABELS},
    Texts(IDS, MASK, LABELS),
    (Texts(IDS, MASK, LABELS), ["a", "b"]),
    Batch(IDS, MASK),
    MAPPING | {"attention_mask": MASK.bool()},
    MAPPING | {"attention_mask": MASK.float()},
    MAPPING | {"attention_mask": (1 - MASK) * -10_000.0},
    MAPPING | {"attention_mask": torch.where(MASK > 0, 0.0, -torch.inf)},
]


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_masks_are_found_and_read(batch):
    assert torch.equal(attended_ids(batch, IDS), MASK > 0)
    assert torch.equal(attended_tokens(batch, (2, 4)), MASK > 0)


@pytest.mark.parametrize("batch", [None, LABELS, (IDS, LABELS), {"input_ids": IDS}, ["a"], {1: IDS}], ids=str)
def test_without_a_mask_all_count(batch):
    assert attended_ids(batch, IDS) is None
    assert attended_tokens(batch, (2, 4)).all()


class Convolution(TracInMixin, pl.LightningModule):
    """Its word table has no ``padding_idx``, and gradients reach padding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def influence_loss(self, batch):
        texts, labels = batch
        words = self.embedding(texts["input_ids"]).transpose(1, 2)
        return functional.cross_entropy(self.head(self.convolution(words).tanh().mean(2)), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_padding_of_texts_beside_their_labels_counts_nothing(tmp_path):
    pl.seed_everything(0, verbose=False)
    items = [({"input_ids": row, "attention_mask": (row != 0).long()}, row[0] % 2) for row in IDS.repeat(4, 1)]
    module = Convolution()
    trainer = quiet(max_epochs=1, callbacks=[TracInCallback(tmp_path, dtype="float32", on_error="raise")])
    trainer.fit(module, DataLoader(items, batch_size=4))
    scores = trainer.influence(DataLoader(items[:2], batch_size=2)).scores
    module.load_state_dict(trainer.callbacks[0].trace.checkpoints[0].weights())
    dense = dense_gradients(
        module.double(), module.embedding, DataLoader(items), lambda batch: module.influence_loss(batch).sum()
    )
    dense[:, 0] = 0  # the word that pads
    expected = 0.1 * dense[:2].flatten(1) @ dense.flatten(1).T
    assert relative_error(scores, expected) < 1e-5
