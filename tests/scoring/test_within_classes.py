"""Self-influence within classes against a loop in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler
from toy import N_TRAIN, Toy, fitted, quiet, texts

from lightning_tracin.scoring.within_classes import within_classes


def expected(values, labels):
    found = np.full(len(values), np.nan)
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        own = [other for other, of in zip(values, labels, strict=True) if of == label and not np.isnan(other)]
        if not np.isnan(value) and own:
            found[place] = (value - np.mean(own)) / np.std(own)
    return found


def test_an_example_is_compared_with_those_of_its_label(toy, trace):
    plain, labels = toy.self_influence(), texts().tensors[1]
    found = quiet().self_influence(trace=trace, within_class=True)
    np.testing.assert_allclose(found.numpy(), expected(plain.double().numpy(), labels.numpy()), rtol=1e-4)


def test_what_training_never_drew_is_not_compared(tmp_path):
    drawn = [0, 2, 3, 5, 8, 11, 13, 14, 17, 19]
    trainer = fitted(tmp_path, data=DataLoader(texts(), batch_size=5, sampler=SubsetRandomSampler(drawn)))
    values = np.full(N_TRAIN, np.nan)
    values[drawn] = trainer.self_influence()[drawn].double()
    found = trainer.self_influence(within_class=True)
    np.testing.assert_allclose(found.numpy(), expected(values, texts().tensors[1].numpy()), rtol=1e-4)


def test_without_a_value_or_a_label_or_others():
    values, labels = torch.tensor([1.0, torch.nan, 3.0, 3.0, 5.0]), torch.tensor([0.0, 0, 1, 1, torch.nan])
    assert within_classes(values, labels).nan_to_num(-9).tolist() == [0, -9, 0, 0, -9]


@pytest.mark.parametrize("size", [1e-24, 1.0, 1e20])
def test_values_of_any_size_and_none_among_copies(size):
    """Squares of what a sure model gives, 1e-24, are 0 in float32; the mean of copies is not their value."""
    values, labels = torch.tensor([5.5, 7.4, 7.7, 4.7, 3.8, 0.1, 0.1, 0.1]) * size, torch.tensor([0.0] * 5 + [1.0] * 3)
    found = within_classes(values, labels)
    np.testing.assert_allclose(found[:5].numpy(), expected(values[:5].double().numpy(), labels[:5].numpy()), rtol=1e-5)
    assert found[5:].tolist() == [0, 0, 0]


def test_without_labels_there_are_no_classes(tmp_path):
    class Unlabelled(Toy):
        def influence_labels(self, batch):
            return None

    trainer = fitted(tmp_path, Unlabelled())
    with pytest.raises(ValueError, match=r"has no labels.*influence_labels"):
        trainer.self_influence(within_class=True)
