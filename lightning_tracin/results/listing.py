"""What is listed of a test example's scores: those that pushed it, strongest first, and equal texts once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from lightning_tracin.gradients.texts import NO_LABEL
from lightning_tracin.report.explanation import Example
from lightning_tracin.storage.trace import Trace


@dataclass(frozen=True)
class Entry:
    """A training example in a list, with those that say the same.

    Attributes:
        index: in the training data set; of equal texts, that of the strongest.
        score: its own.
        total: the sum of the scores of all equal texts.
        equal: the indices of the other ones, strongest first.
    """

    index: int
    score: float
    total: float
    equal: tuple[int, ...]


#: The proponents and the opponents of a test example.
Sides: TypeAlias = tuple[Sequence[Entry], Sequence[Entry]]


class Pushing(Protocol):
    """Tells who pushed a test example, strongest first."""

    def __call__(self, row: int, n: int, *, proponents: bool) -> list[tuple[int, float]]:
        """The n strongest of a side and their scores; fewer where there are no more."""


class TextKeys:
    """What training examples say, as keys that are equal where token ids and label are, read when they are asked for.

    An example whose label is not known, as it is not one number (soft labels, several values), is like no other.

    Args:
        texts: the trace that has them, or the examples that a saved result holds; any other counts as different from
            all.
    """

    def __init__(self, texts: Trace | Mapping[int, Example]) -> None:
        self._texts = texts
        self._keys: dict[int, Hashable] = {}

    def of(self, indices: Sequence[int]) -> Mapping[int, Hashable]:
        """The keys by index, of these and of all that were asked for before."""
        missing = sorted(set(indices) - self._keys.keys())
        if missing and isinstance(self._texts, Trace):
            texts = self._texts.texts(missing)
            said = zip(missing, texts.ids_by_example(), texts.marks_by_example(), strict=True)
            for place, (index, ids, marks) in enumerate(said):
                labels = (texts.label_of(place), texts.label_set_of(place))
                is_told = labels != (None, None) or set(marks) > {NO_LABEL}
                self._keys[index] = (*ids, (*labels, *marks)) if ids and is_told else index
        elif missing and not isinstance(self._texts, Trace):
            self._keys.update((index, _key_of(self._texts.get(index), index)) for index in missing)
        return self._keys


def _key_of(example: Example | None, index: int) -> Hashable:
    """What an example says, as a key; where that is not known, its index."""
    if example is None or not example.ids or (example.label is None and not example.marks):
        return index
    of_words = ((word.tag, word.is_prompt) for word in example.words)  # all that files of earlier versions tell
    return *example.ids, example.label, *example.marks, *of_words


def listed(k: int, rows: Sequence[int], pushing: Pushing, keys: TextKeys) -> dict[int, Sides]:
    """The k strongest entries of each side of some test examples.

    Equal texts have equal gradients, and so stand side by side among the strongest. As many are looked at as it takes
    to come upon the text after the k-th, so that of each entry all are found.

    Args:
        k: how many of each side.
        rows: of the scores.
        pushing: tells who pushed.
        keys: tells which of them say the same.
    """
    found: dict[tuple[int, bool], list[Entry]] = {}
    wanted, n = [(row, proponents) for row in rows for proponents in (True, False)], k + 1
    while wanted:
        looked = {each: pushing(each[0], n, proponents=each[1]) for each in wanted}
        known = keys.of([index for pairs in looked.values() for index, _ in pairs])
        found |= {each: _entries(pairs, known) for each, pairs in looked.items()}
        wanted = [each for each in wanted if len(found[each]) <= k and len(looked[each]) == n]
        n *= 2
    return {row: (found[row, True][:k], found[row, False][:k]) for row in rows}


def _entries(pairs: Sequence[tuple[int, float]], keys: Mapping[int, Hashable]) -> list[Entry]:
    """Training examples, with those of equal keys in one entry, in the order of the first of each."""
    groups: dict[Hashable, list[tuple[int, float]]] = {}
    for index, score in pairs:
        groups.setdefault(keys[index], []).append((index, score))
    return [
        Entry(*group[0], total=sum(score for _, score in group), equal=tuple(index for index, _ in group[1:]))
        for group in groups.values()
    ]
