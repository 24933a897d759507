"""The two colours of all that is drawn: blue for what pushes with a score, orange for what pushes against it.

They are those of Okabe and Ito, which colour-blind people tell apart, too. A terminal has neighbours of the two among
its 256 named colours: as grounds for white or black text, and as text that is legible on a dark and on a light screen.
The HTML page has a ramp of five shades of each hue in ``page.css``, for its light and for its dark scheme.
"""

from __future__ import annotations

from typing import NamedTuple

FOR, AGAINST = "#0072B2", "#E69F00"

#: Further colours of theirs, for charts of several kinds of things of which neither is for or against.
FURTHER = (AGAINST, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


class TerminalStyles(NamedTuple):
    """What rich prints one of the two colours with.

    Attributes:
        strong: a word that has a large part of a score.
        medium: a word that has some part of it.
        weak: a word that has a small part of it.
        number: a number of that sign.
    """

    strong: str
    medium: str
    weak: str
    number: str


TERMINAL_FOR = TerminalStyles(
    "bold bright_white on dark_blue", "bright_white on dodger_blue3", "underline", "dodger_blue1"
)

TERMINAL_AGAINST = TerminalStyles("bold black on orange1", "black on light_goldenrod2", "underline", "dark_orange3")
