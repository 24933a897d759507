"""Rich tables of influential examples, their words shaded by their share of the score."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_tracin.explanation import Example, Explanation, Influential

# Colour-blind safe, legible on light and on dark: what pushed in the score's direction, and what pushed against it.
_FOR = ("bold white on dark_blue", "white on dodger_blue3", "underline")
_AGAINST = ("bold black on orange1", "black on light_goldenrod2", "underline")
_STRONG, _MEDIUM, _WEAK = 0.2, 0.07, 0.02  # shares of the sum of the terms' magnitudes
_MAX_WORDS = 120


def explanation_tables(explanation: Explanation) -> list[RenderableType]:
    """A panel with the test example, and a table with its proponents and opponents."""
    table = Table(expand=True, show_lines=False, header_style="bold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("train", justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True, max_width=14)
    table.add_column("text", ratio=1, overflow="fold")
    for name, influentials in (("proponents", explanation.proponents), ("opponents", explanation.opponents)):
        table.add_row(Text(name, style="italic"), "", "", "", "")
        for each in influentials:
            table.add_row(*_cells(each))
        table.add_section()
    text = shaded(explanation.test, explanation.terms, sum(explanation.terms))
    return [Panel(text, title=_title(explanation.test), title_align="left"), table]


def shaded(example: Example, terms: Sequence[float], score: float) -> Text:
    """An example's text, each word shaded by the share of its term, by whether it pushed with the score or against.

    Args:
        example: the example.
        terms: of each of its words; none leaves it plain.
        score: its sign says what is for and what is against.
    """
    if not example.words:
        return Text("(no text stored)", style="dim italic")
    total = sum(map(abs, terms))
    text = Text()
    for number, word in enumerate(example.words[:_MAX_WORDS]):
        term = terms[number] if terms else 0.0
        text.append(word.before)
        text.append(word.text, style=_style(abs(term) / total if total else 0.0, with_score=term * score >= 0))
    if len(example.words) > _MAX_WORDS:
        text.append(" ...", style="dim")
    return text


def _cells(influential: Influential) -> list[RenderableType]:
    share = "" if influential.share is None else f"{influential.share:.1%}"
    return [
        f"{influential.score:+.3g}",
        share,
        str(influential.example.index),
        Text(influential.example.label or ""),
        shaded(influential.example, influential.terms, influential.score),
    ]


def _title(test: Example) -> Text:
    title = Text(f"Test example {test.index}")
    if test.label is not None:
        title.append(f", label {test.label}")
    if test.prediction is not None:
        title.append(f", prediction {test.prediction}", style="bold" if test.is_mistaken else "")
        title.append("" if test.confidence is None else f" ({test.confidence:.0%})")
    return title


def _style(share: float, *, with_score: bool) -> str:
    strong, medium, weak = _FOR if with_score else _AGAINST
    if share >= _STRONG:
        return strong
    if share >= _MEDIUM:
        return medium
    return weak if share >= _WEAK else ""
