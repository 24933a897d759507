"""What arguments of the command ``lightning-tracin`` are read as; what is refused is a wrong command line."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A whole number from 1 on.

    Raises:
        ArgumentTypeError: if it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number from 1 on, but got {text!r}")
    return int(text)


def path(text: str) -> str:
    """A file or folder, which has a name: an empty one would be the folder that the command is run in.

    Raises:
        ArgumentTypeError: if it has none.
    """
    if not text:
        raise ArgumentTypeError("expected the name of a file or folder, but got '': is a variable of the shell empty?")
    return text


def written_file(text: str) -> str:
    """A file to write to that is not stdout.

    Raises:
        ArgumentTypeError: if it has no name, or is.
    """
    if text == "-":
        raise ArgumentTypeError("expected the name of a file, but got '-': this is not written to stdout")
    return path(text)
