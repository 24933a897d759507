"""Choosing a few examples that differ, so that checks on them see what depends on an example's length or label.

Most data sets hold examples of one length in many, and of one label in many: a few that are spread evenly may all be
alike, and then neither a collate function that sorts by length nor a loss that weighs classes shows itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader

from lightning_tracin.bridge.fingerprint import N_READ, length_of
from lightning_tracin.bridge.loaders import loader_over
from lightning_tracin.bridge.unmoved import random_state_kept
from lightning_tracin.gradients.batches import counts_of

#: What is noticed of an example: how much it holds, and its label, where that is one number, or how many it has.
Look: TypeAlias = tuple[int, float | None]

UNSEEN: Look = (-1, None)

_BATCHES = _OF_A_BATCH = 8  # so many batches, and examples of each, are looked at: 64, as of a whole data set


def look_of(item: Any) -> Look:
    """What is noticed of an example."""
    return length_of(item), _label_of(item)


def _label_of(item: Any) -> float | None:
    """``labels`` or ``label`` of a mapping, or the second of a pair, where it is a number, or one in a column.

    Of several labels, as of tokens, their number, without those of -100, which mark that there is none.
    """
    if isinstance(item, Mapping):
        label = item.get("labels", item.get("label"))
    else:
        label = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else None
        label = _label_of(label) if isinstance(label, Mapping) else label
    if isinstance(label, (list, tuple)) and len(label) == 1:
        label = label[0]
    if isinstance(label, (str, bytes)):
        return None
    if isinstance(label, (list, tuple)) or math.prod(getattr(label, "shape", ())) != 1:
        return _number_of_labels(label)
    try:
        return float(label.item() if hasattr(label, "item") else label)
    except (TypeError, ValueError, OverflowError):
        return None


def _number_of_labels(labels: Any) -> float | None:
    """How many labels are not -100; None where they are no whole numbers."""
    try:
        counts = counts_of(torch.as_tensor(labels)[None])
    except (TypeError, ValueError, RuntimeError):  # of words, or of rows that differ in length
        return None
    return None if counts is None else float(counts[0])


def looks_of(items: Sequence[Any]) -> list[Look]:
    """What is noticed of examples: a collate function of its own."""
    return [look_of(item) for item in items]


def looks_at(loader: DataLoader[Any], indices: Sequence[int]) -> dict[int, Look]:
    """What is noticed of up to 64 examples, spread evenly, the first and the last among them.

    They are read by the loader's workers, if it has any.

    Args:
        loader: of the examples.
        indices: those that may be read.
    """
    size = min(N_READ, len(indices))
    sampled = [int(indices[place * (len(indices) - 1) // max(1, size - 1)]) for place in range(size)]
    if loader.batch_size is None and loader.batch_sampler is None:  # the data set hands out batches
        return dict.fromkeys(sampled, UNSEEN)
    with random_state_kept():  # a data set may draw at random, and an iterator draws a base seed
        found = [look for batch in loader_over(loader, sampled, collate_fn=looks_of) for look in batch]
    if len(found) != size:  # the __getitems__ of a data set may hand out a batch
        found = [UNSEEN] * size
    return dict(zip(sampled, found, strict=True))


def differing_in_batch(loader: DataLoader[Any], batches: Sequence[Sequence[int]], n_examples: int) -> list[int]:
    """A few examples of one batch that differ, of the batch in which they differ most.

    Args:
        loader: of the examples.
        batches: those to choose from; some are looked at, spread evenly.
        n_examples: how many to choose, if a batch has so many.
    """
    several = [batch for batch in batches if len(batch) > 1] or list(batches)
    some = [batch[:: -(-len(batch) // _OF_A_BATCH)] for batch in several[:: -(-len(several) // _BATCHES)]]
    looked = looks_at(loader, list(dict.fromkeys(index for batch in some for index in batch)))
    seen = [{index: looked[index] for index in batch if index in looked} for batch in some]
    news = [(sum(len({look[part] for look in each.values()}) for part in (0, 1)), len(each)) for each in seen]
    return differing(seen[news.index(max(news))], n_examples) if seen else []


def differing(looked: Mapping[int, Look], n_examples: int) -> list[int]:
    """A few examples that differ in length and label, else lie apart; the first and the last are always among them.

    Those that are chosen for a smaller number are among those for a larger one.

    Args:
        looked: by index, in the order of the data set, what was noticed.
        n_examples: how many to choose, if there are so many.

    Returns:
        Indices, in the order of ``looked``.
    """
    indices, looks = list(looked), list(looked.values())
    chosen = sorted({0, len(looks) - 1} & set(range(len(looks))))[:n_examples]
    while len(chosen) < min(n_examples, len(looks)):
        others = [place for place in range(len(looks)) if place not in chosen]
        news = [_novelty(looks, chosen, place) for place in others]
        chosen.append(others[news.index(max(news))])
    return [indices[place] for place in sorted(chosen)]


def _novelty(looks: Sequence[Look], chosen: Sequence[int], place: int) -> tuple[int, int]:
    """In how much an example differs from all that are chosen, and how far it is from them."""
    new = sum(all(looks[place][part] != looks[each][part] for each in chosen) for part in (0, 1))
    return new, min(abs(place - each) for each in chosen)
