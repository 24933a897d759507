"""The test examples of retrainings, read once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_tracin.bridge.fingerprint import hash_of, seeded
from lightning_tracin.bridge.query_examples import checked_test_loader
from lightning_tracin.bridge.unmoved import random_state_kept, unmoved
from lightning_tracin.gradients.batches import batch_size, described_batch


def batches_of(test: Any) -> list[Any]:
    """The batches of test examples.

    Args:
        test: their loader, or several, one after the other.

    Raises:
        TypeError: if there is something else.
        ValueError: if there are none.
    """
    loaders = list(test.values()) if isinstance(test, Mapping) else test
    loaders = loaders if isinstance(loaders, (list, tuple)) and _are_loaders(loaders) else [loaders]
    batches = []
    with random_state_kept():
        for loader in loaders:
            checked = checked_test_loader(loader)
            with unmoved(checked):
                seeded()
                batches += list(checked)
    if not batches:
        raise ValueError("The test loader is empty: there is nothing to look at after a retraining.")
    return batches


def n_examples(batches: Sequence[Any]) -> int:
    """How many examples there are in batches.

    Raises:
        ValueError: if a batch does not tell.
    """
    sizes = [batch_size(batch) for batch in batches]
    if None in sizes:
        bad = described_batch(batches[sizes.index(None)])
        raise ValueError(f"Cannot tell how many test examples a batch of {bad} holds: there is no tensor in it.")
    return sum(size or 0 for size in sizes)


def fingerprint(batches: Sequence[Any]) -> str:
    """A hash of all examples of batches."""
    return hashlib.sha256(b"".join(map(hash_of, batches))).hexdigest()


def _are_loaders(given: Sequence[Any]) -> bool:
    return bool(given) and all(isinstance(each, DataLoader) for each in given)
