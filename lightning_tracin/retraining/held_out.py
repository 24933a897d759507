"""The test examples of retrainings, read once, and put in the order in which results have them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_tracin.bridge.fingerprint import hash_of, seeded
from lightning_tracin.bridge.loaders import loader_of_batches
from lightning_tracin.bridge.mixin import labels_of_module, token_ids_of
from lightning_tracin.bridge.query_examples import checked_test_loader
from lightning_tracin.bridge.unmoved import random_state_kept, unmoved
from lightning_tracin.gradients.batches import batch_size, described_batch

_BATCH_SIZE = 32  # of a data set, where training's is not known


@dataclass(frozen=True)
class HeldOut:
    """Test examples.

    Attributes:
        batches: as their loaders give them.
        places: (n_test,) int64, for each test example its place in the batches: by index in the data set, and of
            several loaders one after the other, as a result has them.
    """

    batches: Sequence[Any]
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> str:
        """A hash of all of them."""
        in_order = torch.equal(self.places, torch.arange(len(self.places)))
        return hashlib.sha256(b"".join(map(hash_of, [*self.batches, *([] if in_order else [self.places])]))).hexdigest()

    def labels(self, module: nn.Module) -> Tensor | None:
        """(n_test,) the label of each, as the module finds it in a batch; None where it is not one number."""
        found = [labels_of_module(module, batch) for batch in self.batches]
        known = [each.flatten() for each in found if each is not None and each.numel() == len(each)]
        return torch.cat(known)[self.places].cpu() if len(known) == len(found) else None

    def token_ids(self) -> list[list[int]] | None:
        """The token ids of each, with padding; None where batches have no such matrix."""
        found = [token_ids_of(batch) for batch in self.batches]
        rows = [row.tolist() for each in found if each is not None for row in each]
        return [rows[place] for place in self.places.tolist()] if len(rows) == len(self) else None


def held_out(test: Any, training_loader: Callable[[], DataLoader[Any]]) -> HeldOut:
    """Read test examples.

    Args:
        test: their loader, or a data set; or several of these in a list or a mapping.
        training_loader: gives a loader of training, whose batch size and collate function serve a data set.

    Raises:
        TypeError: if there is something else.
        ValueError: if there are none, or their number cannot be told.
    """
    batches: list[Any] = []
    places: list[Tensor] = []
    with random_state_kept():
        for part in _parts(test):
            loader = part if _is_loader(part) else _loader_of(part, training_loader)
            read, order = _read(checked_test_loader(loader))
            places.append(order + sum(_n_examples(batches)))
            batches += read
    if not batches:
        raise ValueError("The test loader is empty: there is nothing to look at after a retraining.")
    return HeldOut(batches, torch.cat(places))


def _parts(test: Any) -> list[Any]:
    """The loaders and data sets in what was passed."""
    several = list(test.values()) if isinstance(test, Mapping) else test
    if isinstance(several, (list, tuple)) and several and all(map(_is_part, several)):
        return list(several)
    if isinstance(test, (str, bytes, Mapping)):
        raise TypeError(
            "The test examples of retrainings must come, with their labels, in a DataLoader or a data set, but got "
            f"{type(test).__name__}."
        )
    return [test]


def _read(loader: Any) -> tuple[list[Any], Tensor]:
    """The batches of a loader, and the place of each example in them, ascending by index in the data set."""
    is_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
    with unmoved(loader):
        seeded()
        if is_stream:
            batches = list(loader)
            return batches, torch.arange(sum(_n_examples(batches)))
        numbers = [[int(each) for each in batch] for batch in loader.batch_sampler or loader.sampler]
        batches = list(loader_of_batches(loader, numbers))
    flat = [number for batch in numbers for number in batch]
    if len(flat) != sum(_n_examples(batches)):
        raise ValueError(
            f"The test loader makes batches of {sum(_n_examples(batches))} rows out of {len(flat)} examples: its "
            "collate function must keep each example as one row."
        )
    place = {number: place for place, number in reversed(list(enumerate(flat)))}
    return batches, torch.tensor([place[number] for number in sorted(place)])


def _n_examples(batches: Sequence[Any]) -> list[int]:
    """How many examples there are in each batch."""
    sizes = []
    for batch in batches:
        size = batch_size(batch)
        if size is None:
            raise ValueError(
                f"Cannot tell how many test examples a batch of {described_batch(batch)} holds: there is no tensor."
            )
        sizes.append(size)
    return sizes


def _loader_of(data: Any, training_loader: Callable[[], DataLoader[Any]]) -> DataLoader[Any]:
    training = training_loader()
    return DataLoader(data, batch_size=training.batch_size or _BATCH_SIZE, collate_fn=training.collate_fn)


def _is_loader(part: Any) -> bool:
    return not (hasattr(part, "__getitem__") and hasattr(part, "__len__")) or isinstance(part, DataLoader)


def _is_part(part: Any) -> bool:
    """Whether something holds examples, rather than being one."""
    of_examples = isinstance(part, (str, bytes, Mapping, list, tuple, Tensor))
    return isinstance(part, DataLoader) or (hasattr(part, "__getitem__") and not of_examples)
