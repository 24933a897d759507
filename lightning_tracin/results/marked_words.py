"""Words that are shown by task: a prompt apart from its completion, two texts apart, tokens with their tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_tracin.gradients.texts import IN_SECOND
from lightning_tracin.report.explanation import Word

#: What stands between two texts of an example, such as the source and the target of a translation.
BETWEEN = " ‖ "

_OUTSIDE = "O"  # the tag of what is nothing in particular


def marked(words: list[Word], ids: Sequence[int], marks: Sequence[int], names: Mapping[int, str]) -> list[Word]:
    """The same words, with what the marks of their tokens say.

    Args:
        words: of an example.
        ids: its token ids.
        marks: of its token ids, see :class:`~lightning_tracin.gradients.texts.Texts`; none where nothing is marked.
        names: what to print for labels.
    """
    if IN_SECOND in marks:
        return _with_border(words, marks.index(IN_SECOND))
    labels = {place: mark for place, mark in enumerate(marks) if mark >= 0}
    if not labels:
        return words
    if all(ids[place] == label for place, label in labels.items()):  # each token is its own label: a language model
        return [replace(word, is_prompt=not word.special and labels.keys().isdisjoint(word.places)) for word in words]
    if all(label in names for label in labels.values()):
        return [replace(word, tag=_tag(word, labels, names)) for word in words]
    return words


def _with_border(words: list[Word], border: int) -> list[Word]:
    """Words, of which the first of the second text stands apart from those before it."""
    first = next((number for number, word in enumerate(words) if word.places[0] >= border), None)
    return [replace(word, before=BETWEEN) if number == first else word for number, word in enumerate(words)]


def _tag(word: Word, labels: Mapping[int, int], names: Mapping[int, str]) -> str | None:
    """What to print for the first label of a word's tokens, if it is anything in particular."""
    name = next((names[labels[place]] for place in word.places if place in labels), _OUTSIDE)
    return None if name == _OUTSIDE else name
