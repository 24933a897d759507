"""Recognising a data set by some of its examples, and how long those are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tracin.bridge.loaders import items_of
from lightning_tracin.bridge.unmoved import random_state_kept

_Note = TypeVar("_Note")

N_READ = 64  # examples, spread evenly, that a data set is known by


def lengths_of(items: Sequence[Any]) -> list[int]:
    """Each example's :func:`length_of`: a collate function of its own."""
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


def fingerprint_of(loader: DataLoader[Any], note: Callable[[Any], _Note]) -> tuple[str, dict[int, _Note]]:
    """A hash of a data set's number of examples and, where they are the same twice, of 64 to 127 of them.

    They are spread evenly, and read in a worker, if the loader has any.

    Args:
        loader: of the examples, which have indices.
        note: what is to be noticed of an example.

    Returns:
        The hash, and what was noticed of the examples, by index.
    """
    dataset: Any = loader.dataset
    n_examples = len(dataset)
    indices = range(0, n_examples, max(1, n_examples // N_READ))
    with random_state_kept():
        read = items_of(loader, [*indices, *indices], _Noticing(note), seeded)
        seeded()
        found = list(read)
    first, again = found[: len(indices)], found[len(indices) :]
    hashes = b"".join(each for each, _ in first)
    if hashes != b"".join(each for each, _ in again):
        hashes = b""  # a data set that has a random generator of its own is told by its number alone
    return number_hash(n_examples, hashes), dict(zip(indices, (noticed for _, noticed in first), strict=True))


def fingerprint_of_all(loader: DataLoader[Any]) -> str:
    """A hash of every example of a data set; of one that looks different the second time, of their number.

    All are read once, and 64 to 127 of them, spread evenly, a second time.

    Args:
        loader: of the examples, which have indices.
    """
    dataset: Any = loader.dataset
    n_examples = len(dataset)
    again = range(0, n_examples, max(1, n_examples // N_READ))
    with random_state_kept():
        read = items_of(loader, [*range(n_examples), *again], _Noticing(_nothing), seeded)
        seeded()
        hashes = [each for each, _ in read]
    is_fixed = [hashes[index] for index in again] == hashes[n_examples:]
    return number_hash(n_examples, b"".join(hashes[:n_examples]) if is_fixed else b"")


def _nothing(item: Any) -> None:
    """What is noticed of an example whose hash is enough."""


def number_hash(n_examples: int, hashes: bytes = b"") -> str:
    """A hash of a number of examples and, if they are there, of some examples' hashes."""
    return hashlib.sha256(f"{n_examples}".encode() + hashes).hexdigest()


def seeded() -> None:
    """Seed the generators of Python, numpy and torch, so that an example augmented by them looks the same each time."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what data sets use)
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed devices, too, whose state nobody puts back


@dataclass(frozen=True)
class _Noticing(Generic[_Note]):
    """In the place of a collate function: an example's hash, and what is noticed of it."""

    note: Callable[[Any], _Note]

    def __call__(self, item: Any) -> tuple[bytes, _Note]:
        seeded()  # for the next one
        return hash_of(item), self.note(item)


def hash_of(item: Any) -> bytes:
    """A hash of an example, or a batch, whatever it is made of."""
    digest = hashlib.sha256()
    add_to_hash(digest, item)
    return digest.digest()


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
        for name in sorted(item.keys(), key=str):  # a TensorDict gives rows
            digest.update(str(name).encode())
            add_to_hash(digest, item[name])
    elif isinstance(item, (list, tuple)):
        for each in item:
            add_to_hash(digest, each)
    elif is_dataclass(item):
        for each in fields(item):
            add_to_hash(digest, getattr(item, each.name))
