"""Batches of a pass are compared with the examples that the collate function was given."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from toy import N_TRAIN, Toy, fitted, loader, texts

from lightning_tracin.bridge.kept_order import collated_order_of
from lightning_tracin.bridge.training_set import TrainingSet

N = 130


class Lengths(Dataset):
    """Texts of one length, but for two beside each other that no check before training looks at."""

    def __init__(self) -> None:
        ids, self.labels = texts(N, length=8).tensors
        ids = ids.clamp(min=1)
        looked = TrainingSet(loader(torch.utils.data.TensorDataset(ids, self.labels))).looked
        self.odd = next(i for i in range(4, N) if i not in looked)
        self.ids = [row[:5] if i == self.odd else row for i, row in enumerate(ids)]

    def __len__(self) -> int:
        return N

    def __getitem__(self, index):
        return self.ids[index], self.labels[index]


def padded(items):
    return pad_sequence([ids for ids, _ in items], batch_first=True), torch.stack([label for _, label in items])


def longest_first(items):
    return padded(sorted(items, key=lambda item: -len(item[0])))


def shortest_first(items):
    return padded(sorted(items, key=lambda item: len(item[0])))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_function_that_sorts_what_was_not_looked_at_is_found(tmp_path, workers):
    """A pass puts long texts first itself, so that only the other way round is seen there."""
    data = Lengths()
    with pytest.raises(ValueError, match="shortest_first, puts the examples of a batch in another order"):
        fitted(tmp_path / "sorting", Toy(), loader(data, collate_fn=shortest_first, num_workers=workers))
    fitted(tmp_path / "padding", Toy(), loader(data, collate_fn=padded, num_workers=workers), trainer={"max_epochs": 1})


def rows(*several, dtype=torch.long):
    return [torch.tensor(row, dtype=dtype) for row in several]


@pytest.mark.parametrize(
    ("items", "batch", "expected"),
    [
        (rows([1, 2], [3, 4]), torch.tensor([[3, 4], [1, 2]]), [1, 0]),
        (rows([1, 2], [3, 4]), torch.tensor([[1, 2], [3, 4]]), None),
        ([{"ids": [1, 2], "label": 0}, {"ids": [3], "label": 1}], torch.tensor([[3, 0], [1, 2]]), None),  # too short
        ([([1, 2], 5), ([3, 4, 5], 6)], {"ids": torch.tensor([[3, 4, 5], [0, 1, 2]])}, [1, 0]),  # padded before
        ([([1, 2], 5), ([3, 4, 5], 6)], {"ids": torch.tensor([[1, 2, 0], [3, 4, 5]])}, None),
        (rows([1, 2], [1, 2]), torch.tensor([[1, 2], [1, 2]]), None),  # which is which cannot be told
        (rows([1, 2], [1, 2], [3, 4]), torch.tensor([[3, 4], [1, 2], [1, 2]]), None),
        (rows([1, 2], [3, 4]), torch.tensor([[9, 2], [1, 9]]), None),  # masked at random
        (["a b", "c d"], torch.tensor([[3, 4], [1, 2]]), None),  # made of texts
        # lengths that are sorted beside texts that are not
        (rows([1, 2], [3, 4]), (torch.tensor([[3, 4], [1, 2]]), torch.tensor([[1, 2], [3, 4]])), None),
    ],
)
def test_only_what_is_certain_is_an_error(items, batch, expected):
    assert collated_order_of(items, batch) == expected


def test_queries_watch_test_examples_too(tmp_path):
    trainer = fitted(tmp_path / "trace")
    data = Lengths()
    assert trainer.influence(loader(data, collate_fn=padded)).scores.shape == (N, N_TRAIN)
