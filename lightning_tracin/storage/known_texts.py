"""Whether a stream gives the examples of an earlier reading again: their numbers are but their places in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_tracin.gradients.texts import Texts


class KnownTexts:
    """Compares the examples of a stream with those of an earlier reading, place by place.

    Some words may differ, or be missing, as they do where words are masked or left out at random, but not the label.

    Args:
        blocks: the texts of the earlier reading, in its order; it may have ended before.
    """

    def __init__(self, blocks: Iterable[Texts]) -> None:
        self._known = _examples(blocks)
        self._n_compared = self._n_equal = 0
        self._others: list[int] = []

    def compare(self, texts: Texts) -> None:
        """Compare the next examples."""
        for (ids, label), (known_ids, known_label) in zip(_examples([texts]), self._known, strict=False):
            likeness = _likeness(ids, known_ids) if label == known_label else 0.0
            if likeness < 0.5:
                self._others.append(self._n_compared)
            self._n_equal += likeness == 1
            self._n_compared += 1

    def check(self) -> None:
        """Check what was compared.

        Raises:
            ValueError: if it was not the same examples, but for what is drawn at random in each.
        """
        n_others = len(self._others)
        repeats = 5 * self._n_equal >= 4 * self._n_compared  # then nothing is drawn at random
        if n_others and (repeats or 2 * n_others > self._n_compared):
            raise ValueError(
                f"The stream of training examples gave others than before at {n_others} of {self._n_compared} places, "
                f"the first of them {self._others[0]}: its examples are numbered by their places, so that gradients "
                "would be stored under the numbers of others. Let it yield the same examples in the same order each "
                "time (do not shuffle by epoch), or use a map-style dataset, which a sampler may shuffle."
            )


def _likeness(ids: Tensor, others: Tensor) -> float:
    """The share of words that two texts have in common: at the same places, if they are of one length."""
    if len(ids) == len(others):
        return float((ids == others).double().mean()) if len(ids) else 1.0
    common = Counter(ids.tolist()) & Counter(others.tolist())
    return min(0.99, 0.8 * common.total() / max(len(ids), len(others)))  # some words are in most texts


def _examples(blocks: Iterable[Texts]) -> Iterator[tuple[Tensor, float | None]]:
    """The token ids and the label of each example."""
    for block in blocks:
        ids = torch.split(block.ids, block.rows_by_example().tolist())
        yield from ((each, block.label_of(place)) for place, each in enumerate(ids))
