"""The batches that a batch sampler of the user's own composes: what it does not put together, nobody else may.

It may know what the collate function needs, such as examples of one length that need no padding, or what memory holds,
such as a number of tokens. A part of such a batch has what the whole has: it is of one length, and holds no more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lightning_tracin.bridge.held_states import GENERATORS
from lightning_tracin.bridge.unmoved import random_state_kept

_DRAWS = 4  # times the data set's size that a sampler is asked for at most: some leave examples out, some never end


class StandIn(BatchSampler):
    """A batch sampler that is in the place of a loader's own.

    Attributes:
        own: what it stands for.
    """

    own: Any


def own_batch_sampler(loader: DataLoader[Any]) -> Any:
    """What composes a loader's batches if that is not torch's own, which takes examples as they come; else None."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while isinstance(sampler, StandIn):  # several callbacks may each have put one
        sampler = sampler.own
    if loader.batch_sampler is None and not isinstance(sampler, BatchSampler):
        return None
    kind = type(sampler)
    is_of_torch = kind.__name__ == "BatchSampler" and kind.__module__.startswith(("torch.", "torchdata."))
    return None if is_of_torch else sampler


def batches_once(loader: DataLoader[Any], at_most: int | None = None) -> list[list[int]] | None:
    """The batches of one iteration of a batch sampler of the user's own, each example once; None without one.

    Args:
        loader: a map-style data set's; its sampler is left as it is.
        at_most: how many to take.
    """
    sampler = own_batch_sampler(loader)
    if sampler is None:
        return None
    n_examples = len(loader.dataset)  # type: ignore[arg-type]
    with random_state_kept():
        return list(islice(_news(iter(_copied(sampler, loader.dataset)), n_examples, set()), at_most))


def batches_of_all(loader: DataLoader[Any]) -> list[list[int]] | None:
    """Batches of every example, by a batch sampler of the user's own; None without one.

    What it leaves out, though it is iterated several times, makes batches of one example each.

    Args:
        loader: a map-style data set's; its sampler is left as it is.
    """
    sampler = own_batch_sampler(loader)
    if sampler is None:
        return None
    n_examples = len(loader.dataset)  # type: ignore[arg-type]
    seen: set[int] = set()
    batches: list[list[int]] = []
    with random_state_kept():
        copied = _copied(sampler, loader.dataset)
        for _ in range(_DRAWS):
            known = len(seen)
            batches += _news(iter(copied), n_examples, seen)
            if len(seen) in (known, n_examples):
                break
    return completed(batches, n_examples)


def joined(parts: Sequence[Sequence[Sequence[int]]], n_examples: int) -> list[list[int]]:
    """The batches of several processes, each example once: their samplers may have a share each, or all the same."""
    return list(_news(chain.from_iterable(parts), n_examples, set()))


def completed(batches: list[list[int]], n_examples: int) -> list[list[int]]:
    """Batches, and of each example that is in none one of its own."""
    seen = {index for batch in batches for index in batch}
    return batches + [[index] for index in range(n_examples) if index not in seen]


def parts_of(batches: Sequence[Sequence[int]], indices: Sequence[int]) -> list[list[int]]:
    """Indices in their order, in batches that are parts of some that were composed."""
    batch_of = {index: number for number, batch in enumerate(batches) for index in batch}
    parts: list[list[int]] = []
    last = None
    for index in indices:
        if batch_of[index] != last:
            parts.append([])
        parts[-1].append(index)
        last = batch_of[index]
    return parts


def numbers_of(batch: Iterable[Any], n_examples: int) -> list[int]:
    """The numbers of the examples that a sampler puts into a batch; -1 is the last one.

    Raises:
        ValueError: if the data set has none of such a number, whatever it may give for it.
    """
    numbers = [int(index) for index in batch]
    for number in numbers:
        if not -n_examples <= number < n_examples:
            raise ValueError(
                f"A sampler asks for example {number} of a data set that had {n_examples} examples when it was first "
                "looked at: let it have all of the examples, and the length to match, from the start."
            )
    return [number % n_examples for number in numbers]


def _news(batches: Iterator[Any], n_examples: int, seen: set[int]) -> Iterator[list[int]]:
    """Of each batch the examples that were in none before, until all were, or a sampler has given plenty."""
    drawn = 0
    for batch in batches:
        indices = numbers_of(batch, n_examples)
        drawn += len(indices)
        new = [index for index in dict.fromkeys(indices) if index not in seen]
        seen.update(new)
        if new:
            yield new
        if len(seen) == n_examples or drawn > _DRAWS * n_examples:
            return


def _copied(sampler: Any, dataset: Any) -> Any:
    """A copy to iterate, with generators and lists of its own, but of the same data set.

    A sampler counts epochs, or shuffles a list in place: training must not find that changed.
    """
    kept = [dataset, *getattr(dataset, "__dict__", {}).values()]  # a data set may be large
    memo = {id(each): each for each in kept if not isinstance(each, GENERATORS)}
    try:
        return copy.deepcopy(sampler, memo)
    except Exception:  # whatever cannot be copied raises: a lock, a file, a generator of Python's that it goes on with
        return copy.copy(sampler)
