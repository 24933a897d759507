"""Collate functions whose rows are no examples: refused before the first step, of the training and the test loader."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from toy import Toy, loader, quiet, test_texts, texts
from variants import Plain

from lightning_tracin import TracInCallback
from lightning_tracin.gradients.batching_check import check_batching

WIDTH = 4


def packed(items):
    """All texts behind each other, with the label of the first one."""
    return torch.cat([ids for ids, _ in items])[None], torch.stack([label for _, label in items])[:1]


def windowed(items):
    """Texts cut into windows; what is padding alone is left out."""
    windows = [(part, label) for ids, label in items for part in ids.split(WIDTH) if part.any()]
    return pad_sequence([part for part, _ in windows], True), torch.stack([label for _, label in windows])


class Streamed(IterableDataset):
    def __len__(self) -> int:
        return len(texts())

    def __iter__(self):
        return iter(texts())


@pytest.mark.parametrize(
    ("data", "cache"),
    [
        *((texts, cache) for cache in ("checkpoint", "training", "on_demand")),
        *((Streamed, cache) for cache in ("checkpoint", "on_demand")),
    ],
)
@pytest.mark.parametrize("kind", [Toy, Plain])
@pytest.mark.parametrize("collate", [packed, windowed])
def test_a_training_loader_is_refused_before_the_first_step(tmp_path, cache, kind, collate, data):
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", cache=cache)])
    with pytest.raises(
        ValueError, match=r"A batch of 4 training examples has [1578] losses: the collate function drops"
    ):
        trainer.fit(kind(), loader(data(), collate_fn=collate))
    assert trainer.global_step == 0
    assert not (tmp_path / "trace").exists()


def test_rows_that_are_as_many_as_the_examples_by_chance():
    """One text has no window, another two."""
    windows = {0: [], 1: [1.0], 2: [2.0], 3: [3.0, 3.5]}

    def batch_of(part):
        return torch.tensor([window for index in range(4)[part] for window in windows[index]])

    whole = batch_of(slice(None))
    with pytest.raises(ValueError, match="A batch of 2 training examples has 1 losses"):
        check_batching(nn.Identity(), lambda batch: batch, batch_of, range(4), whole, whole)


@pytest.mark.parametrize("collate", [packed, windowed])
def test_a_test_loader_is_refused(toy, collate):
    with pytest.raises(ValueError, match=r"A batch of \d test examples has \d+ losses: the collate function drops"):
        toy.influence(loader(test_texts(), collate_fn=collate))
