"""Whether a loader's collate function leaves the examples of a batch in the order in which they come.

Rows of a batch are numbered by the indices that the sampler yields: one that sorts them by length, as is the habit with
``pack_padded_sequence``, would have gradients stored, and scores told, under the numbers of other examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_tracin.bridge.fingerprint import hash_of, length_of
from lightning_tracin.bridge.loaders import batches_over
from lightning_tracin.bridge.looks import Look, differing, differing_in_batch, looks_at
from lightning_tracin.bridge.own_batches import batches_once
from lightning_tracin.bridge.unmoved import random_state_kept

_EXAMPLES = 8  # that are collated

_BATCHES = 64  # of a batch sampler of the user's own, that some are taken from

_TIMES = 10  # that a collate function is seen to reorder before it is refused: random numbers may look so once


def check_order(loader: Any, kind: str, looked: Mapping[int, Look] | None = None) -> None:
    """Check on a few examples that a loader's collate function leaves them in the order in which they come.

    Those are chosen that differ in length, out of one batch if a batch sampler of the user's own composes batches. They
    are collated in their order, and once more with the first one last. The largest thing in the batches that holds the
    same rows both times tells, so that neither what is drawn at random counts, nor lengths that are sorted beside texts
    that are not.

    Args:
        loader: of the training or the test examples; a stream, or one that does not batch, is not looked at.
        kind: "training" or "test", for the message.
        looked: what was noticed of examples, by index; without it some are read, of those that the sampler may give.

    Raises:
        ValueError: if it does not, as one that sorts a batch by length.
    """
    if not isinstance(loader, DataLoader) or getattr(loader.batch_sampler, "batch_size", None) == 1:
        return
    dataset, sampler = loader.dataset, loader.sampler
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None or not hasattr(dataset, "__len__"):
        return
    composed = batches_once(loader, _BATCHES)
    if composed is not None:
        few = differing_in_batch(loader, composed, _EXAMPLES)
        fewer = few[:-1]
    else:
        indices = sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(len(dataset))
        if len(indices) < 2:
            return
        looked = looks_at(loader, indices) if looked is None else looked
        few = differing(looked, _EXAMPLES)
        fewer = differing(looked, len(few) - 1)  # the one that is left out tells least
    if len(few) < 2:  # a sampler may give one example several times
        return
    # what by chance is as long as there are few is not as long as these
    fewer = fewer if len(few) > 3 else few
    asked = [order for pick in [few, fewer] * (_TIMES // 2) for order in (pick, pick[1:] + pick[:1])]
    with random_state_kept():  # the data set and the collate function may draw at random
        batches = batches_over(loader, asked)
        reordered = all(_reordered(next(batches), next(batches), len(pick)) for pick in asked[::2])
        del batches  # with its worker
    if not reordered:
        return
    name = getattr(loader.collate_fn, "__qualname__", type(loader.collate_fn).__name__)
    raise ValueError(
        f"The collate function of the {kind} loader, {name}, puts the examples of a batch in another order than they "
        "come in, so that they cannot be numbered. Let it leave them in their order: pack_padded_sequence takes them "
        "so with enforce_sorted=False. Or sort them inside the model, and undo it there."
    )


def _reordered(batch: Any, shifted_batch: Any, n_examples: int) -> bool:
    """Whether a batch, and that of the same examples with the first one last, have the same rows in another order."""
    found: list[tuple[int, bool]] = []  # how much each of their parts holds, and whether it is in order
    for (size, ways), (_, others) in zip(_rows(batch, n_examples), _rows(shifted_batch, n_examples), strict=False):
        pairs = list(zip(ways, others, strict=False))
        in_order = [rows != shifted for rows, shifted in pairs if rows[1:] + rows[:1] == shifted]
        if in_order:
            if any(in_order):  # else all rows are equal, which tells nothing
                found.append((size, True))
        elif any(sorted(rows) == sorted(shifted) for rows, shifted in pairs):
            found.append((size, False))
    return bool(found) and not max(found)[1]


def _rows(item: Any, n_examples: int) -> Iterator[tuple[int, list[list[bytes]]]]:
    """How much each part of a batch holds that can be examples' rows, and these rows in each way to read them."""
    if isinstance(item, (Tensor, np.ndarray)):
        ways = _slices(item, n_examples)
        if ways:
            yield length_of(item), ways
    elif isinstance(item, Mapping):
        for each in item.values():
            yield from _rows(each, n_examples)
    elif isinstance(item, (list, tuple)):
        whole = [[hash_of(each) for each in item]] if len(item) == n_examples else []
        parts = [part for each in item for part in _rows(each, n_examples)]
        if whole and not parts:
            yield length_of(item), whole
        for size, ways in parts:
            yield size, whole + ways
    elif is_dataclass(item):
        for each in fields(item):
            yield from _rows(getattr(item, each.name), n_examples)


def _slices(item: Tensor | np.ndarray, n_examples: int) -> list[list[bytes]]:
    """An array's rows, where its first dimension can be that of the examples, and its columns, where the second can."""
    plain = item.layout == torch.strided and not item.is_nested if isinstance(item, Tensor) else item.dtype != object
    if not plain or (item.shape == (n_examples,) and set(item.tolist()) == set(range(n_examples))):
        return []  # the latter are places in the batch
    dims = [dim for dim, size in enumerate(item.shape[:2]) if size == n_examples]
    return [[hash_of(item[i] if dim == 0 else item[:, i]) for i in range(n_examples)] for dim in dims]
