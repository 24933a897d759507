"""Texts of examples, of vocabularies and of files, as they can be shown and stored: without what steers a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# C0 (escape sequences) but for white space, DEL, C1, and the halves of characters.
_CONTROL = "\\x00-\\x08\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff"

# Signs that turn the direction of text around, so that it reads as another: embeddings, overrides, isolates and marks.
_BIDI = "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"

#: Signs that do not show but change how others do.
STEERING = re.compile(f"[{_CONTROL}{_BIDI}]")

_TURNING = re.compile(f"[{_BIDI}]")

_SPACES = re.compile("[\t\n\v\f\r\u2028\u2029]")

# What a spreadsheet takes for a formula at the beginning of a cell.
_FORMULA = ("=", "+", "-", "@", "\t", "\n")

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.ASCII)


def cleaned(text: str) -> str:
    r"""A text without control characters, which become �, and without marks of direction; white space stays.

    Example:
        >>> cleaned("a\x1b[2Jb\u202ec\nd")
        'a�[2Jbc\nd'
    """
    return STEERING.sub(lambda sign: "" if _TURNING.match(sign[0]) else "�", text)


def printable(text: str) -> str:
    """A text on one line, without what would steer a terminal."""
    return _SPACES.sub(" ", cleaned(text))


def in_a_cell(text: str) -> str:
    """A text that a spreadsheet does not take for a formula, with line feeds for other ends of lines.

    Example:
        >>> in_a_cell("=1+1"), in_a_cell("1+1"), in_a_cell("-1")
        ("'=1+1", '1+1', '-1')
    """
    text = "\n".join(cleaned(text).replace("\r\n", "\n").split("\r"))
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def storable(text: str) -> str:
    """A text that can be written to a file: halves of characters become �, or one character where two fit together."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def storable_if_known(text: str | None) -> str | None:
    """A text that can be written to a file, where there is one."""
    return None if text is None else storable(text)


def enumerated(things: Sequence[Any], most: int) -> str:
    """Things on one line, and how many more there are than are named.

    Example:
        >>> enumerated([3, 5, 8], 2), enumerated(["a", "b"], 2)
        ('3, 5 and 1 more', 'a, b')
    """
    named = ", ".join(printable(str(each)) for each in things[:most])
    return f"{named} and {len(things) - most} more" if len(things) > most else named
