"""Recognising a data set by some of its examples, and how long those are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

_SAMPLED = 64  # examples that the fingerprint looks at


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


def fingerprint_of(
    dataset: Any, n_examples: int, *, read: bool, see: Callable[[int, Any], None] = lambda _, __: None
) -> str:
    """A hash of a data set's number of examples and, where they may be read and are the same twice, of some of them.

    Args:
        dataset: the examples, by index.
        n_examples: their number.
        read: whether they may be read.
        see: is shown each of them, with its index, each time that it is read.
    """
    found = [_sample_hash(dataset, n_examples, see) for _ in range(2)] if read else []
    if len(set(found)) == 1:
        return found[0]
    return hashlib.sha256(f"{n_examples}".encode()).hexdigest()  # the data set has a random generator of its own


def _sample_hash(dataset: Any, n_examples: int, see: Callable[[int, Any], None]) -> str:
    """A hash of the number of examples and of 64 to 127 of them, spread evenly."""
    digest = hashlib.sha256(f"{n_examples}".encode())
    with isolate_rng():
        random.seed(0)  # so that an example which is augmented at random looks the same each time
        np.random.seed(0)  # noqa: NPY002 (the global state is what data sets use)
        torch.manual_seed(0)
        for index in range(0, n_examples, max(1, n_examples // _SAMPLED)):
            item = dataset[index]
            add_to_hash(digest, item)
            see(index, item)
    return digest.hexdigest()


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
