"""Targets: what of a test example is explained, as it was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from lightning_tracin.checked_numbers import index_of
from lightning_tracin.gradients.printable import storable

#: A class by its number or by its name.
Class: TypeAlias = int | str

#: What of a test example is explained.
Asked: TypeAlias = Class | tuple[Class, Class] | list[Class]

#: Places of tokens: the same for all test examples, or some for each, by index in the test data set.
PositionsOfLoader: TypeAlias = Sequence[int] | Sequence[Sequence[int]]

#: The same, by the names of several test loaders, whose examples are each numbered from 0.
Positions: TypeAlias = PositionsOfLoader | Mapping[str, PositionsOfLoader]

_LISTED = 8  # So many positions are printed.


@dataclass(frozen=True)
class Target:
    """What of a test example is explained. A positive score always means that training made it likelier.

    Attributes:
        what: the example's "label", the model's own "prediction", or a "class" that was named.
        classes: the class, or two: the first, and the one that it is held against.
        positions: of the tokens that count, the same for all examples; None for all that have a label.
        positions_of_each: the same, for each example of the test data set.
        of_loaders: for each of several test loaders, by name, the target that its own positions make of this.
    """

    what: Literal["label", "prediction", "class"] = "label"
    classes: tuple[Class, ...] = ()
    positions: tuple[int, ...] | None = None
    positions_of_each: tuple[tuple[int, ...], ...] | None = None
    of_loaders: tuple[tuple[str, Target], ...] = ()

    @classmethod
    def of(cls, asked: Asked, positions: Positions | None = None) -> Target:
        """A target from the arguments of ``trainer.influence``.

        Raises:
            TypeError: if it is no name, number or pair of them, or if positions are no whole numbers.
            ValueError: if a pair is of one class, or a position is negative.
        """
        if isinstance(positions, Mapping):
            if not positions:
                raise ValueError("positions is empty: name a place, or leave it out.")
            of_loaders = tuple((str(name), cls.of(asked, part)) for name, part in positions.items())
            return replace(cls.of(asked), of_loaders=of_loaders)
        common, of_each = _positions(positions)
        if isinstance(asked, str) and asked in ("label", "prediction"):
            return cls(asked, (), common, of_each)  # type: ignore[arg-type]
        parts = asked if isinstance(asked, (tuple, list)) else (asked,)
        classes = tuple(_class(part, asked) for part in parts)
        if isinstance(asked, (tuple, list)) and len(classes) != 2:
            raise ValueError(
                f"target={asked!r} must be a pair of classes, the one to explain and the one that it is held against, "
                f"but has {len(classes)}."
            )
        if len(classes) == 2 and classes[0] == classes[1]:
            raise ValueError(f"target={asked!r} holds a class against itself: name two classes.")
        return cls("class", classes, common, of_each)

    def __str__(self) -> str:
        what = ", not ".join(map(str, self.classes)) if self.what == "class" else self.what
        if self.positions is not None:
            more = ", ..." if len(self.positions) > _LISTED else ""
            return f"{what} at {', '.join(map(str, self.positions[:_LISTED]))}{more}"
        of_each = self.positions_of_each is not None or self.of_loaders
        return f"{what} at positions of each" if of_each else what

    @property
    def is_plain(self) -> bool:
        """Whether the module's own losses of the labels are meant, as they are."""
        return self.what == "label" and not self.has_positions

    @property
    def has_positions(self) -> bool:
        """Whether only some tokens count."""
        return self.positions is not None or self.positions_of_each is not None or bool(self.of_loaders)

    def for_loaders(self, names: Sequence[str]) -> list[Target]:
        """The target of each of several test loaders.

        Args:
            names: of the loaders; of one, which has none, an empty one.

        Raises:
            ValueError: if it is not known of which loader's examples the positions are.
        """
        if not self.of_loaders:
            if self.positions_of_each is not None and len(names) > 1:
                raise ValueError(
                    "positions of each example are by its index in its data set, of which there are several: pass a "
                    f"mapping of the loaders' names, {', '.join(map(repr, names))}, to positions."
                )
            return [self] * len(names)
        known = dict(self.of_loaders)
        if len(names) == 1:
            raise ValueError(f"positions are of the loaders {', '.join(known)}, but there is one: pass its positions.")
        if known.keys() != set(names):
            raise ValueError(f"positions are of the loaders {', '.join(known)}, but there are {', '.join(names)}.")
        return [known[name] for name in names]

    def positions_at(self, number: int) -> tuple[int, ...] | None:
        """The places of the tokens that count in a test example, by its index in the data set; None for all.

        Raises:
            ValueError: if there are none for it.
        """
        if self.positions_of_each is None:
            return self.positions
        if number >= len(self.positions_of_each):
            raise ValueError(
                f"positions has the places of {len(self.positions_of_each)} test examples, but there is a test example "
                f"{number}. Pass a sequence for each example of the test data set, or one for all."
            )
        return self.positions_of_each[number]


def number_of_class(given: Class, names: Mapping[int, str]) -> int:
    """The number of a class. A name counts before a number that is written as text.

    Args:
        given: its number or name.
        names: of the classes, as far as they are known.

    Raises:
        ValueError: if no class, or more than one, has the name.

    Example:
        >>> names = {0: "business", 1: "tech", 2: "1"}
        >>> number_of_class("tech", names), number_of_class("1", names), number_of_class(1, names)
        (1, 2, 1)
    """
    if isinstance(given, int):
        return given
    found = [number for number, name in names.items() if name == given]
    if len(found) > 1:
        raise ValueError(f"Classes {found} are all named {given!r}: pass a number as target.")
    if found:
        return found[0]
    if given.isdecimal():
        return int(given)
    known = ", ".join(repr(name) for name in list(names.values())[:50])
    listed = f"The classes are {known}" if known else "No names are known (influence_label_names); pass its number"
    raise ValueError(f'There is no class {given!r}. {listed}; other targets are "label" and "prediction".')


def _class(given: Any, asked: Any) -> Class:
    if isinstance(given, str):
        return storable(given)  # as names of classes are
    number = index_of(given)
    if number is None:
        raise TypeError(
            'target must be "label", "prediction", a class by its number or name, or a pair of two classes, but got '
            f"{asked!r}."
        )
    if number < 0:
        raise ValueError(f"target={asked!r}: classes are numbered from 0.")
    return number


def _positions(given: Any) -> tuple[tuple[int, ...] | None, tuple[tuple[int, ...], ...] | None]:
    """Positions for all examples, and for each; at most one of the two is given."""
    if given is None:
        return None, None
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"positions must be a sequence of places of tokens, or one for each example, but got {given!r}."
        )
    entries = [each.tolist() if hasattr(each, "tolist") else each for each in given]
    if not entries:
        raise ValueError("positions is empty: name a place, or leave it out.")
    if all(isinstance(each, (list, tuple, range)) for each in entries):
        return None, tuple(tuple(_place(place, given) for place in of_one) for of_one in entries)
    return tuple(_place(each, given) for each in entries), None


def _place(given: Any, positions: Any) -> int:
    place = index_of(given)
    if place is None:
        raise TypeError(
            f"positions must be whole numbers, or a sequence of them for each example, but got {positions!r}."
        )
    if place < 0:
        raise ValueError(f"positions count an example's tokens from 0, but got {place}.")
    return place
