"""The training set as numbered examples: read in the order that is asked for, and recognised when it comes again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_tracin.processes import Processes

_CHECKED = 8  # examples that are looked at before training: each check costs a few passes over them
_SAMPLED = 64  # examples that the fingerprint looks at
_BATCH_SIZE = 32  # for a batch sampler that does not tell its own


class TrainingSet:
    """A training data loader's data set, each example once, numbered as the data set numbers it.

    Shuffling, sampling with weights, ``drop_last`` and batch samplers of the loader do not matter here.

    Args:
        loaders: what ``train_dataloader`` returned: one ``DataLoader``.

    Raises:
        TypeError: if it is not a ``DataLoader``.
        ValueError: if there are several loaders, none, one in a list or dict, no examples, or no way to tell how many
            examples there are.
    """

    def __init__(self, loaders: Any) -> None:
        loader = _only_loader(loaders, "training")
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"The training set must come in a torch.utils.data.DataLoader, but got {type(loader).__name__}: "
                "its examples could not be numbered."
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

    def loader_over(self, indices: Sequence[int]) -> DataLoader[Any]:
        """A loader over some examples, in their order; of a stream, over all in its own."""
        loader = self.loader
        if self.iterable:  # several workers would each yield all of it, or in an order of their own
            return DataLoader(loader.dataset, batch_size=loader.batch_size, **{**_options(loader), "timeout": 0})
        return _loader_over(loader, indices)

    def lengths(self, indices: Sequence[int]) -> Tensor | None:
        """How much text each of some examples holds, as far as the data set tells.

        It does not where a few of them are all of one length, as texts that are padded already, nor where it is a
        stream or hands out whole batches. Otherwise they are read once, by the loader's workers.

        Args:
            indices: of the examples.

        Returns:
            (len(indices),) int64, to compare with each other: numbers, and characters of strings; or None.
        """
        if self.iterable or (self.loader.batch_size is None and self.loader.batch_sampler is None):
            return None
        if self._lengths is None or self._lengths[0] != indices:
            with isolate_rng():  # a data set may draw at random
                few = {length_of(self.loader.dataset[index]) for index in indices[:: max(1, len(indices) // _SAMPLED)]}
                read = _loader_over(self.loader, indices, collate_fn=_lengths_of) if len(few) > 1 else ()
                found = [each for batch in read for each in batch]
            told = len(found) == len(indices)  # a data set's __getitems__ may hand out a batch
            self._lengths = indices, torch.tensor(found) if found and told else None
        return self._lengths[1]

    @property
    def first_indices(self) -> list[int]:
        """The data set indices of :meth:`first_batch`, as far as it holds so many."""
        n_examples = len(self)
        few = n_examples if self.iterable else min(_CHECKED, n_examples, _batch_size(self.loader))
        return [number * n_examples // few for number in range(few)]

    def first_batch(self) -> Any:
        """A batch of a few examples, to check what a fit can do; a stream's own first batch.

        They are spread evenly: where a data set is sorted by label, or by length, its first ones do not tell a weighted
        loss from another.
        """
        return next(iter(self.loader_over(self.first_indices)))

    def fingerprint(self) -> str:
        """A hash of the number of examples and of 64 of them, spread evenly.

        Of the number only, where the data set is a stream or gives other examples each time that they are read.
        """
        return _fingerprint(self.loader.dataset, len(self), read=not self.iterable)


class _InOrder(DistributedSampler[Any]):
    """Some examples. Lightning takes it for a process's own share, and puts no sampler in its place.

    Args:
        dataset: the data set.
        indices: of the examples, or lists of them that are batches.
    """

    def __init__(self, dataset: Any, indices: Sequence[Any]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.indices = indices

    def __iter__(self) -> Iterator[Any]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def only_test_loader(loaders: Any) -> Any:
    """The one loader of test examples.

    Raises:
        TypeError: if it is not a data loader.
        ValueError: if there are several loaders, none, or an empty one.
    """
    loader = _only_loader(loaders, "test")
    if isinstance(loader, (list, tuple, dict, Tensor)) or not hasattr(loader, "__iter__"):
        raise TypeError(f"The test examples must come in a DataLoader, but got {type(loader).__name__}.")
    iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if isinstance(loader, DataLoader) and loader.batch_sampler is None and not iterable:
        raise ValueError(
            "The test DataLoader does not batch (batch_size=None), so its examples cannot be numbered. Give it a "
            "batch_size or a batch_sampler."
        )
    if hasattr(loader, "__len__") and not iterable and len(loader) == 0:
        raise ValueError("The test loader is empty: there is nothing to explain.")
    return loader


def own_part(loader: Any, processes: Processes) -> Any:
    """A loader over this process's part of the test examples.

    Lightning's own way to divide them leaves some out where the processes shuffle differently, and fails where there
    are fewer examples than processes.

    Raises:
        ValueError: if they cannot be divided, or if the processes have different ones.
    """
    if processes.size == 1:
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "The test examples come in a stream, which several processes cannot divide among themselves. Use "
            "devices=1, or a map-style dataset."
        )
    n_examples = len(loader.dataset)  # type: ignore[arg-type]
    processes.require_same("test examples", _fingerprint(loader.dataset, n_examples, read=True))
    yielded = {int(index) for batch in loader.batch_sampler or () for index in batch}
    return _loader_over(loader, processes.gather(sorted(yielded))[0][processes.rank :: processes.size])


def spare_batch(loader: DataLoader[Any], processes: Processes) -> Any:
    """A batch of the first few examples that the first process's loader, as :func:`own_part` gives it, begins with.

    Args:
        loader: this process's; one of :meth:`TrainingSet.loader_over` serves too.
        processes: every one of them must call it.
    """
    first = processes.gather(list(loader.sampler)[:_CHECKED])[0]
    options = {**_options(loader), "timeout": 0}  # which only workers may have, and one batch needs none
    if loader.batch_size is None:  # the sampler yields batches
        return next(iter(DataLoader(loader.dataset, batch_size=None, sampler=first[:1], **options)))
    return next(iter(DataLoader(loader.dataset, batch_sampler=[first], **options)))


def _loader_over(loader: DataLoader[Any], indices: Sequence[int], **others: Any) -> DataLoader[Any]:
    """A loader like another, but for some options, over some examples in their order."""
    options = {**_options(loader), **others}
    if loader.num_workers:
        options |= {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    if loader.batch_size is None and loader.batch_sampler is None:
        if not isinstance(loader.sampler, BatchSampler):
            raise ValueError(
                "The training DataLoader does not batch (batch_size=None), so its examples cannot be numbered. "
                "Give it a batch_size, or a BatchSampler as its sampler."
            )
        batches = list(BatchSampler(indices, _batch_size(loader), drop_last=False))
        return DataLoader(loader.dataset, batch_size=None, sampler=_InOrder(loader.dataset, batches), **options)
    sampler = _InOrder(loader.dataset, indices)
    return DataLoader(loader.dataset, batch_size=_batch_size(loader), sampler=sampler, **options)


def _batch_size(loader: DataLoader[Any]) -> int:
    own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return loader.batch_size or getattr(own, "batch_size", None) or _BATCH_SIZE


def _options(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader handles what it has read."""
    return {
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
    }


def _lengths_of(items: Sequence[Any]) -> list[int]:
    return [length_of(item) for item in items]


def length_of(item: Any) -> int:
    """How many numbers and characters an example is made of."""
    if isinstance(item, (Tensor, np.ndarray)):
        return int(np.prod(item.shape))
    if isinstance(item, (str, bytes)):
        return len(item)
    if isinstance(item, Mapping):
        return sum(length_of(each) for each in item.values())
    if isinstance(item, (list, tuple)):
        return sum(length_of(each) for each in item)
    if is_dataclass(item):
        return sum(length_of(getattr(item, each.name)) for each in fields(item))
    return 1


def _fingerprint(dataset: Any, n_examples: int, *, read: bool) -> str:
    found = [_sample_hash(dataset, n_examples) for _ in range(2)] if read else []
    if len(set(found)) == 1:
        return found[0]
    return hashlib.sha256(f"{n_examples}".encode()).hexdigest()  # the data set has a random generator of its own


def _sample_hash(dataset: Any, n_examples: int) -> str:
    """A hash of the number of examples and of 64 to 127 of them, spread evenly."""
    digest = hashlib.sha256(f"{n_examples}".encode())
    with isolate_rng():
        random.seed(0)  # so that an example which is augmented at random looks the same each time
        np.random.seed(0)  # noqa: NPY002 (the global state is what data sets use)
        torch.manual_seed(0)
        for index in range(0, n_examples, max(1, n_examples // _SAMPLED)):
            add_to_hash(digest, dataset[index])
    return digest.hexdigest()


def _only_loader(loaders: Any, kind: str) -> Any:
    """The one loader in what Lightning takes for loaders; that of training must stand there by itself."""
    loaders = getattr(loaders, "iterables", loaders)  # Lightning's CombinedLoader
    container = type(loaders).__name__
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if len(loaders) != 1:
            raise ValueError(
                f"Influence needs one {kind} loader, but got {len(loaders)} of them. Join the data sets "
                "(torch.utils.data.ConcatDataset), so that each example has one number."
            )
        if kind == "training":
            raise ValueError(
                f"The training loader comes in a {container}, so that training_step is given each batch in one too; "
                "influence gives it the batch alone. Pass the loader itself, and let training_step take its batch."
            )
        return loaders[0]
    if loaders is None:
        raise ValueError(f"There is no {kind} loader: pass one.")
    return loaders


def add_to_hash(digest: Any, item: Any) -> None:
    """Add an example to the hash, whatever it is made of; objects that have no bytes count by their type."""
    digest.update(type(item).__name__.encode())
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        item = item.float().numpy() if item.dtype == torch.bfloat16 else item.numpy()
    if isinstance(item, np.ndarray) and item.dtype != object:
        digest.update(repr(item.shape).encode() + np.ascontiguousarray(item).tobytes())
    elif isinstance(item, (str, bytes, int, float, bool, np.generic)):
        digest.update(repr(item).encode())
    elif isinstance(item, Mapping):
        for name in sorted(item, key=str):
            digest.update(str(name).encode())
            add_to_hash(digest, item[name])
    elif isinstance(item, (list, tuple)):
        for each in item:
            add_to_hash(digest, each)
    elif is_dataclass(item):
        for each in fields(item):
            add_to_hash(digest, getattr(item, each.name))
