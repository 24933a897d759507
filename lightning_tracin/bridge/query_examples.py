"""The test examples of a query: the loader that they come in, and the part that each process reads, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_tracin.bridge.fingerprint import fingerprint_of
from lightning_tracin.bridge.loaders import batches_over, loader_of_batches, loader_over
from lightning_tracin.bridge.looks import look_of
from lightning_tracin.bridge.own_batches import batches_once, joined
from lightning_tracin.bridge.training_set import N_CHECKED
from lightning_tracin.parallel.processes import Processes


def checked_test_loader(loader: Any, name: str = "") -> Any:
    """A loader of test examples, if they can be numbered.

    Args:
        loader: the loader.
        name: its own, where there are several.

    Raises:
        TypeError: if it is not a data loader, or can be read but once.
        ValueError: if it does not batch, or is empty.
    """
    if hasattr(loader, "__next__") or isinstance(loader, (set, frozenset)):
        raise TypeError(
            f"The test examples must come in one order, at each checkpoint, but got {type(loader).__name__}, which "
            "gives them once, or in no order. Pass a list, list(...), of texts or rows, or a DataLoader."
        )
    is_data = hasattr(loader, "__getitem__") and not isinstance(loader, DataLoader)  # a tensor, a table
    is_data = is_data or any(kind.__name__ == "IterableDataset" for kind in type(loader).__mro__)  # either library's
    if is_data or not hasattr(loader, "__iter__"):
        raise TypeError(
            f"The test examples must come in a DataLoader, but got {type(loader).__name__}. Pass a list of texts or "
            "rows, a data set that has a length and takes indices, or put it into a loader: DataLoader(data, "
            "batch_size=...), with the collate function of training."
        )
    iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if isinstance(loader, DataLoader) and loader.batch_sampler is None and not iterable:
        raise ValueError(
            "The test DataLoader does not batch (batch_size=None), so its examples cannot be numbered. Give it a "
            "batch_size or a batch_sampler."
        )
    if hasattr(loader, "__len__") and not iterable and len(loader) == 0:
        named = f" {name!r}" if name else ""
        raise ValueError(f"The test loader{named} is empty: there is nothing to explain.")
    return loader


def example_blocks(loader: Any, n_examples: int | None, processes: Processes) -> list[Any]:
    """Loaders over this process's part of the test examples, block by block.

    One process reads a stream in one block. What a batch sampler of the user's own puts together stays together.
    Lightning's own way to divide examples among processes leaves some out where these shuffle differently, and fails
    where there are fewer examples than processes.

    Args:
        loader: of the test examples.
        n_examples: how many make a block; None for all.
        processes: those that each take their part.

    Raises:
        ValueError: if the examples cannot be divided, or if the processes have different ones.
    """
    is_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
    batches = None if is_stream else batches_once(loader)
    fits = is_stream or n_examples is None or _n_yielded(loader) <= n_examples
    if processes.size == 1 and batches is None and fits:
        return [loader]
    if is_stream:
        raise ValueError(
            "The test examples come in a stream, which several processes cannot divide among themselves. Use "
            "devices=1, or a map-style dataset."
        )
    if processes.size > 1:
        fingerprint, _ = fingerprint_of(loader, look_of)
        processes.require_same("test examples", fingerprint)
    if batches is not None:
        batches = joined(processes.gather(batches), len(loader.dataset))
        return [
            loader_of_batches(loader, block[processes.rank :: processes.size])
            for block in _blocks_of(batches, n_examples or len(loader.dataset))
        ]
    yielded = processes.gather(sorted({int(index) for batch in loader.batch_sampler or () for index in batch}))[0]
    size = max(processes.size, n_examples or len(yielded))
    blocks = [yielded[start : start + size] for start in range(0, len(yielded), size)]
    return [loader_over(loader, block[processes.rank :: processes.size]) for block in blocks]


def _blocks_of(batches: Sequence[list[int]], n_examples: int) -> list[list[list[int]]]:
    """Batches in blocks of at most so many examples, but of one batch at least."""
    blocks: list[list[list[int]]] = [[]]
    held = 0
    for batch in batches:
        held += len(batch)
        if blocks[-1] and held > n_examples:
            blocks.append([])
            held = len(batch)
        blocks[-1].append(batch)
    return blocks


def _n_yielded(loader: DataLoader[Any]) -> int:
    """How many examples a loader gives at most."""
    return len(loader) * (loader.batch_size or 1)


def spare_batch(loader: DataLoader[Any], processes: Processes) -> Any:
    """A batch of the first few examples that the first process's loader, one of :func:`example_blocks`, begins with.

    Args:
        loader: this process's; one of :meth:`TrainingSet.loader_over` serves too.
        processes: every one of them must call it.
    """
    first = processes.gather(list(loader.sampler)[:N_CHECKED])[0]
    if loader.batch_sampler is None:  # the sampler yields batches, and the data set gives them whole
        return next(batches_over(loader, first[:1]))
    if isinstance(first[0], list):  # the sampler of loader_of_batches
        first = first[0][:N_CHECKED]
    return next(batches_over(loader, [first]))
