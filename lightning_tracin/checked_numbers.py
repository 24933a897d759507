"""Numbers that users pass: checked where they come in, named where they are none, and kept as Python's own.

An option that is none (2.5 words, True examples) is told before a fit or a query is spent on it, and what numpy gives
does not reach a file that holds only Python's. The module stands below all folders, so that each takes numbers by the
same functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

#: Larger numbers do not fit into a tensor.
LARGEST = 2**62


def is_whole(value: object) -> bool:
    """Whether something is a whole number, Python's or numpy's.

    Example:
        >>> import numpy as np
        >>> [is_whole(each) for each in (3, np.int64(3), 3.0, True)]
        [True, True, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def index_of(value: Any) -> int | None:
    """The place in a sequence that something stands for, also the one element of a tensor; None if it is none.

    Example:
        >>> import torch
        >>> index_of(torch.tensor([[4, 7]])[0, 1]), index_of(1.5)
        (7, None)
    """
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def whole_number(
    name: str,
    value: Any,
    at_least: int = 1,
    at_most: int | None = None,
    *,
    allowed: str = "a whole number",
    why: str = "",
) -> int:
    """A whole number as Python has it.

    Args:
        name: of the argument, for the message.
        value: what was given for it.
        at_least: the smallest that it may be.
        at_most: the largest; by default what fits into a tensor.
        allowed: what the argument takes, for the message.
        why: it may be no other, for the message.

    Raises:
        ValueError: if it is none, or beyond these bounds.

    Example:
        >>> whole_number("k", 2.5)
        Traceback (most recent call last):
        ValueError: k must be a whole number of at least 1, but got 2.5.
    """
    largest = LARGEST if at_most is None else at_most
    if is_whole(value) and at_least <= value <= largest:
        return int(value)
    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    if at_most is None and is_whole(value) and value > largest:
        bounds = "of at most 2**62"
    raise ValueError(f"{name} must be {allowed} {bounds}{why}, but got {value!r}.")


def whole_number_or_none(name: str, value: Any, at_least: int = 1) -> int | None:
    """The same where None says something, too.

    Raises:
        ValueError: if it is neither.
    """
    return None if value is None else whole_number(name, value, at_least, allowed="None or a whole number")


def whole_numbers(name: str, values: Any, at_least: int = 1, at_most: int | None = None) -> tuple[int, ...]:
    """Whole numbers of a sequence, an array or a tensor.

    Raises:
        ValueError: if it is no such, or one of them is no whole number within these bounds.

    Example:
        >>> whole_numbers("ks", [5, 0.5])
        Traceback (most recent call last):
        ValueError: ks[1] must be a whole number of at least 1, but got 0.5.
    """
    listed = enumerate(_listed(name, values))
    return tuple(whole_number(f"{name}[{place}]", each, at_least, at_most) for place, each in listed)


def pair_of_whole_numbers(name: str, value: Any, of: str) -> tuple[int, int]:
    """Two whole numbers of at least 1, from a tuple or a list.

    Args:
        name: of the argument, for the message.
        value: what was given for it.
        of: what the two are of, for the message.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> pair_of_whole_numbers("rank", [128, 32], "of inputs and of outputs")
        (128, 32)
    """
    numbers = list(value) if isinstance(value, Sequence) else []
    if len(numbers) != 2 or not all(is_whole(each) and 1 <= each <= LARGEST for each in numbers):
        raise ValueError(f"{name} must be a pair of whole numbers of at least 1, {of}, but got {value!r}.")
    return int(numbers[0]), int(numbers[1])


def real_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """A finite number as Python has it.

    Args:
        name: of the argument, for the message.
        value: what was given for it.
        above: what it must be larger than.
        at_least: the smallest that it may be.
        below: what it must be smaller than.
        at_most: the largest that it may be.

    Raises:
        ValueError: if it is none, NaN, infinite, or beyond these bounds.

    Example:
        >>> import numpy as np
        >>> real_number("alpha", np.float32(0.5), above=0)
        0.5
        >>> real_number("share", 1, above=0, below=1)
        Traceback (most recent call last):
        ValueError: share must be a finite number above 0 and below 1, but got 1.
    """
    number = _float_of(value)
    is_within = (
        (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )
    if math.isfinite(number) and is_within:
        return number
    bounds = {"above": above, "of at least": at_least, "below": below, "of at most": at_most}
    named = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)
    raise ValueError(f"{name} must be {f'a finite number {named}'.rstrip()}, but got {value!r}.")


def real_numbers(name: str, values: Any, **bounds: float | None) -> tuple[float, ...]:
    """Finite numbers of a sequence, an array or a tensor.

    Args:
        name: of the argument, for the message.
        values: what was given for it.
        bounds: of each, as :func:`real_number` takes them.

    Raises:
        ValueError: if it is no such, or one of them is no number within these bounds.
    """
    return tuple(real_number(f"{name}[{place}]", each, **bounds) for place, each in enumerate(_listed(name, values)))


def _listed(name: str, values: Any) -> Iterable[Any]:
    """Values one by one, those of an array or a tensor as Python has them."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be a list of numbers, but got {values!r}.")
    return values


def _float_of(value: Any) -> float:
    """A real number as Python has it; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
