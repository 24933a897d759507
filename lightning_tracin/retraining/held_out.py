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
from lightning_tracin.bridge.mixin import labels_of_module
from lightning_tracin.bridge.query_examples import checked_test_loader
from lightning_tracin.bridge.unmoved import random_state_kept, unmoved
from lightning_tracin.gradients.batches import batch_size, described_batch, shown_labels_of, tensors_of
from lightning_tracin.gradients.losses import require_one_each

_BATCH_SIZE = 32  # of a data set, where training's is not known


@dataclass(frozen=True)
class HeldOut:
    """Test examples.

    Attributes:
        batches: as their loaders give them.
        sizes: how many examples there are in each batch.
        places: (n_test,) int64, for each test example its place in the batches: by index in the data set, and of
            several loaders one after the other, as a result has them.
    """

    batches: Sequence[Any]
    sizes: Sequence[int]
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> str:
        """A hash of all of them."""
        in_order = torch.equal(self.places, torch.arange(len(self.places)))
        return hashlib.sha256(b"".join(map(hash_of, [*self.batches, *([] if in_order else [self.places])]))).hexdigest()

    def check_losses(self, n_losses: Sequence[int]) -> None:
        """Check that every batch was looked at, and had a loss for each of its examples.

        Args:
            n_losses: how many each batch had.

        Raises:
            ValueError: if not.
        """
        if len(n_losses) != len(self.batches):
            raise ValueError(
                f"The trainer looked at {len(n_losses)} of {len(self.batches)} batches of test examples: leave out its "
                "limit_predict_batches or fast_dev_run."
            )
        for of_batch, n in zip(n_losses, self.sizes, strict=True):
            require_one_each(of_batch, n, "test")

    def labels(self, module: nn.Module) -> Tensor | None:
        """(n_test,) the label of each, as the module finds it in a batch; None where it is not one number."""
        found = [labels_of_module(module, batch) for batch in self.batches]
        known = [
            each.flatten() for each, n in zip(found, self.sizes, strict=True) if each is not None and each.numel() == n
        ]
        return torch.cat(known)[self.places].cpu() if len(known) == len(found) else None

    def whole_numbers(self) -> list[set[int]]:
        """All whole numbers that stand in the row of each example, its token ids among them.

        Of a tensor that is not laid out by examples, each has all; where batches have but one number for each example,
        there are none.
        """
        found = [row for batch, n in zip(self.batches, self.sizes, strict=True) for row in _rows(batch, n)]
        return [found[place] for place in self.places.tolist()]


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
    sizes: list[int] = []
    places: list[Tensor] = []
    with random_state_kept():
        for part in _parts(test):
            loader = part if _is_loader(part) else _loader_of(part, training_loader)
            read, of_each, order = _read(checked_test_loader(loader))
            places.append(order + sum(sizes))
            batches += read
            sizes += of_each
    if not batches:
        raise ValueError("The test loader is empty: there is nothing to look at after a retraining.")
    return HeldOut(batches, sizes, torch.cat(places))


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


def _read(loader: Any) -> tuple[list[Any], list[int], Tensor]:
    """The batches of a loader, their sizes, and the place of each example in them, ascending by index in the data set.

    The sampler says how many examples are in a batch, whose tensors may have them in any dimension, or in none.
    """
    is_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
    with unmoved(loader):
        seeded()
        if is_stream:
            batches = list(loader)
            sizes = [_n_examples(batch) for batch in batches]
            return batches, sizes, torch.arange(sum(sizes))
        numbers = [[int(each) for each in batch] for batch in loader.batch_sampler or loader.sampler]
        batches = list(loader_of_batches(loader, numbers))
    for batch, of_batch in zip(batches, numbers, strict=True):
        _require_rows(batch, len(of_batch))
    flat = [number for batch in numbers for number in batch]
    place = {number: place for place, number in reversed(list(enumerate(flat)))}
    return batches, list(map(len, numbers)), torch.tensor([place[number] for number in sorted(place)])


def _require_rows(batch: Any, n: int) -> None:
    """Check, before anything is trained, that a batch may have n examples; how many losses it has is seen later.

    Raises:
        ValueError: if no tensor in it has so many rows, or columns.
    """
    shapes = [tuple(each.shape) for each in tensors_of(batch)]
    if shapes and not any(n in shape[:2] for shape in shapes):
        raise ValueError(
            f"The test loader makes a batch of tensors of the shapes {', '.join(map(str, shapes))} out of {n} "
            "examples: its collate function must neither drop nor add examples."
        )


def _n_examples(batch: Any) -> int:
    """How many examples there are in a batch that nobody numbers: as many as labels, else as its first tensor is long.

    Raises:
        ValueError: if there is no tensor.
    """
    labels = shown_labels_of(batch)
    size = batch_size(batch) if labels is None or labels.dim() == 0 else len(labels)
    if size is None:
        raise ValueError(
            f"Cannot tell how many test examples a batch of {described_batch(batch)} holds: there is no tensor."
        )
    return size


def _rows(batch: Any, n: int) -> list[set[int]]:
    """The whole numbers of each of a batch's n examples."""
    found: list[set[int]] = [set() for _ in range(n)]
    for each in tensors_of(batch):
        if each.is_floating_point() or each.is_complex() or each.dtype == torch.bool or each.numel() <= n:
            continue  # labels, lengths and offsets are no texts
        dims = [dim for dim in range(min(each.dim(), 2)) if each.shape[dim] == n]
        for number, row in enumerate(found):
            for part in [each.select(dim, number) for dim in dims] or [each]:
                row.update(part.flatten().tolist())
    return found


def _loader_of(data: Any, training_loader: Callable[[], DataLoader[Any]]) -> DataLoader[Any]:
    training = training_loader()
    return DataLoader(data, batch_size=training.batch_size or _BATCH_SIZE, collate_fn=training.collate_fn)


def _is_loader(part: Any) -> bool:
    return not (hasattr(part, "__getitem__") and hasattr(part, "__len__")) or isinstance(part, DataLoader)


def _is_part(part: Any) -> bool:
    """Whether something holds examples, rather than being one."""
    of_examples = isinstance(part, (str, bytes, Mapping, list, tuple, Tensor))
    return isinstance(part, DataLoader) or (hasattr(part, "__getitem__") and not of_examples)
