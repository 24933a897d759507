"""The training set as numbered examples: read in the order that is asked for, and recognised when it comes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tracin.bridge.extents import Extent, extent_of
from lightning_tracin.bridge.fingerprint import fingerprint_of, hash_of, lengths_of, number_hash, seeded
from lightning_tracin.bridge.loaders import (
    batch_size_of,
    batches_over,
    hands_out_batches,
    items_of,
    loader_of_batches,
    loader_options,
    loader_over,
    only_training_loader,
    worker_options,
)
from lightning_tracin.bridge.looks import UNSEEN, Look, differing, differing_in_batch, look_of
from lightning_tracin.bridge.own_batches import batches_of_all, completed, joined, parts_of
from lightning_tracin.bridge.unmoved import random_state_kept, unmoved
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.storage.trace import Trace

N_CHECKED = 8  # examples that are looked at before training: each check costs a few passes over them

# Packages whose loaders give what a plain one gives.
_PLAIN_LOADERS = {"torch", "torchdata", "accelerate", "lightning", "lightning_fabric", "pytorch_lightning"}


class TrainingSet:
    """A training data loader's data set, each example once, numbered as the data set numbers it.

    Shuffling, sampling with weights and ``drop_last`` of the loader do not matter here. What a batch sampler of the
    user's own puts together, and nothing else, is read together.

    Args:
        loaders: what ``train_dataloader`` returned: one ``DataLoader``.

    Raises:
        TypeError: if it is not a ``DataLoader``.
        ValueError: if there are several loaders, none, one in a list or dict, one that does not batch, no examples, or
            no way to tell how many examples there are.
    """

    def __init__(self, loaders: Any) -> None:
        loader = only_training_loader(loaders)
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"The training set must come in a torch.utils.data.DataLoader, but got {type(loader).__name__}: "
                "its examples could not be numbered. Pass the loader of the fit, as in train_dataloaders=DataLoader("
                "data, batch_size=..., collate_fn=...), or its datamodule."
            )
        self.loader = loader
        self.iterable = isinstance(loader.dataset, IterableDataset)
        if not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                f"The training set ({type(loader.dataset).__name__}) does not tell how many examples it has. Give it "
                "a __len__, and let it yield the same examples in the same order each time, or use a map-style "
                "dataset."
            )
        if len(self) == 0:
            raise ValueError("The training set is empty.")
        if not self.iterable:
            hands_out_batches(loader)
        self._looked: dict[int, Look] = {}
        self._extents: dict[int, Extent] = {}
        self._first_indices: list[int] | None = None
        self._given: int | None = None
        self._lengths: tuple[Sequence[int], Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def check_divisible(self, processes: Processes) -> None:
        """Check that several processes can each read a part of the training set.

        Raises:
            ValueError: if they cannot.
        """
        if self.iterable and processes.size > 1:
            raise ValueError(
                f"The training set ({type(self.loader.dataset).__name__}) is a stream, which several processes cannot "
                "divide among themselves. Use devices=1, or a map-style dataset."
            )

    @cached_property
    def batches(self) -> list[list[int]] | None:
        """Batches of all examples as the user's own batch sampler composes them; None if any may be in one batch."""
        return None if self.iterable else batches_of_all(self.loader)

    def agree_on_batches(self, processes: Processes) -> None:
        """Let all processes know the same :attr:`batches`, those of all their samplers; every one must call it."""
        composed = [batch for batch in self.batches or () if len(batch) > 1]  # else it may be what this sampler lacks
        found = processes.gather(composed)
        if processes.size > 1 and self.batches is not None:
            self.batches = completed(joined(found, len(self)), len(self))

    def loader_over(self, indices: Sequence[int]) -> DataLoader[Any]:
        """A loader over some examples, in their order; of a stream, over all in its own.

        What follows each other there is in one batch as far as the batch size, or :attr:`batches`, let it.
        """
        loader = self.loader
        if self.iterable:  # several workers would each yield all of it, or in an order of their own
            options = {**loader_options(loader), **worker_options(loader)}
            return DataLoader(loader.dataset, batch_size=loader.batch_size, **options)
        if self.batches is not None:
            return loader_of_batches(loader, parts_of(self.batches, indices))
        return loader_over(loader, indices)

    def lengths(self, indices: Sequence[int]) -> Tensor | None:
        """How much text each of some examples holds, as far as the data set tells.

        It does not where a few of them are all of one length, as texts that are padded already, nor where it is a
        stream or hands out whole batches. Otherwise they are read once, by the loader's workers.

        Args:
            indices: of the examples.

        Returns:
            (len(indices),) int64, to compare with each other: numbers, and characters of strings; or None.
        """
        if self.iterable or hands_out_batches(self.loader):
            return None
        if self._lengths is None or self._lengths[0] != indices:
            few = {length for length, _ in self.looked.values() if length != UNSEEN[0]}
            with random_state_kept():  # a data set may draw at random
                read = loader_over(self.loader, indices, collate_fn=lengths_of) if len(few) > 1 else ()
                found = [each for batch in read for each in batch]
            told = len(found) == len(indices)  # a data set's __getitems__ may hand out a batch
            self._lengths = indices, torch.tensor(found) if found and told else None
        return self._lengths[1]

    @property
    def first_indices(self) -> list[int]:
        """The data set indices of :meth:`first_batch`, as far as it holds so many."""
        if self.iterable:
            return list(range(len(self)))
        if self._first_indices is None and self.batches is not None:
            self._first_indices = differing_in_batch(self.loader, self.batches, N_CHECKED)
        return self._first_indices or differing(self.looked, min(N_CHECKED, batch_size_of(self.loader)))

    @property
    def first_size(self) -> int | None:
        """How many examples :meth:`first_batch` was collated of; None of a stream that does not tell."""
        return self._given if self.iterable else len(self.first_indices)

    def first_batch(self) -> Any:
        """A batch of a few examples, to check what a fit can do; a stream's own first batch.

        They differ in length and label, as far as that can be told: where all are alike, a loss that weighs classes, or
        tokens, looks like any other.
        """
        return next(self.first_batches())

    def first_batches(self) -> Iterator[Any]:
        """What :meth:`first_batch` gives, the same once more, and its two halves, every second example in each.

        One worker reads them all: several would each begin with the same random numbers.
        """
        few = self.first_indices
        if not self.iterable:
            return batches_over(self.loader, [few, few, few[::2], few[1::2]])
        loader = self.loader_over(few)
        if loader.batch_size is not None and not loader.num_workers:
            collate = loader.collate_fn

            def counted(items: list[Any]) -> Any:
                self._given = len(items)
                return collate(items)

            loader.collate_fn = counted
        return iter(loader)

    def warn_of_unseen(self) -> None:
        """Warn if the loader's own iteration is not seen, or reading examples moves what cannot be put back.

        The latter are others the second time. Where workers read, nothing is moved in this process.
        """
        kind = type(self.loader)
        if kind.__iter__ is not DataLoader.__iter__ and kind.__module__.partition(".")[0] not in _PLAIN_LOADERS:
            rank_zero_warn(
                f"{kind.__name__} iterates in a way of its own (__iter__), and TracInCallback reads the training set "
                "by a plain DataLoader: if it changes batches there, gradients are of other examples than training's. "
                "Change them in the collate function, or in on_after_batch_transfer."
            )
        if self.loader.num_workers or self._alike_twice(self.first_batch):
            return
        dataset, function = self.loader.dataset, self.loader.collate_fn
        name = type(dataset).__name__
        if not self.iterable and self._alike_twice(lambda: [dataset[index] for index in self.first_indices]):
            name = getattr(function, "__qualname__", type(function).__name__)
        rank_zero_warn(
            f"{name} gives other examples each time that the same ones are asked for, by a random generator or a "
            "counter that TracInCallback cannot find and put back: what it reads, before training and for its passes, "
            "moves that, and training is not bit for bit what it is without the callback. Keep the generator in an "
            "attribute of the data set or the collate function, or let workers read (num_workers=1)."
        )

    def _alike_twice(self, read: Callable[[], Any]) -> bool:
        """Whether a reading gives the same again, when everything that is known to have moved was put back."""
        found = []
        for _ in range(2):
            with unmoved(self.loader), random_state_kept():
                seeded()
                found.append(hash_of(read()))
        return found[0] == found[1]

    def fingerprint(self) -> str:
        """A hash of the number of examples and of 64 of them, spread evenly.

        Of the number only, where the data set is a stream or gives other examples each time that they are read.
        """
        found, noted = number_hash(len(self)), dict[int, tuple[Look, Extent]]()
        if not self.iterable:
            found, noted = fingerprint_of(self.loader, _look_and_extent)
        self._looked = {index: look for index, (look, _) in noted.items()}
        self._extents = {index: extent for index, (_, extent) in noted.items()}
        self._looked.setdefault(len(self) - 1, UNSEEN)
        return found

    @property
    def looked(self) -> Mapping[int, Look]:
        """What was noticed of the examples that :meth:`fingerprint` read, and the last one; call that before.

        Else it is called now: examples may be slow to read, so they are read once for both.
        """
        if not self._looked:
            self.fingerprint()
        return self._looked

    def extents(self) -> tuple[dict[int, Extent], list[Extent]]:
        """How much examples hold: those of the first batch, by their place in it, as far as they were read, and others.

        The others are spread evenly over the data set; of a stream none is known.
        """
        first = dict(enumerate([] if self.iterable else self.first_indices))
        known = {place: self._extents[index] for place, index in first.items() if index in self._extents}
        if len(known) < min(2, len(first)):
            with random_state_kept():  # a data set may draw at random
                read = list(items_of(self.loader, list(first.values()), extent_of, seeded))
            known = dict(zip(first, read, strict=True))
        return known, list(self._extents.values())


def _look_and_extent(item: Any) -> tuple[Look, Extent]:
    return look_of(item), extent_of(item)


@dataclass(frozen=True)
class RecordedFit:
    """What a fit recorded, and of which training set.

    Attributes:
        trace: the folder.
        training_set: the examples.
    """

    trace: Trace
    training_set: TrainingSet
