"""Rich tables of influential examples, their shared words shaded by their share of the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# Colour-blind safe, legible on light and on dark: what pushed in the score's direction, and what pushed against it.
_FOR = ("bold white on dark_blue", "white on dodger_blue3", "underline")
_AGAINST = ("bold black on orange1", "black on light_goldenrod2", "underline")
_STRONG, _MEDIUM, _WEAK = 0.2, 0.07, 0.02  # shares of the sum of the terms' magnitudes
_MAX_TOKENS = 120


@dataclass(frozen=True)
class Example:
    """What an example says.

    Attributes:
        ids: token ids in reading order.
        words: what to print for each.
        label: what to print for its label, if it has one.
    """

    ids: Sequence[int]
    words: Sequence[str]
    label: str | None

    def text(self) -> str:
        """The tokens as one line of text."""
        return "".join(before + word for before, word in map(_spaced, self.words)).strip()


@dataclass(frozen=True)
class Influential:
    """A training example that pushed a test example.

    Attributes:
        train_index: index in the training data set.
        score: the pair's score.
        example: what it says.
        terms: the term of each shared token id; empty for methods without words.
    """

    train_index: int
    score: float
    example: Example
    terms: Mapping[int, float]


def influence_tables(
    title: str, test: Example, proponents: Sequence[Influential], opponents: Sequence[Influential]
) -> list[RenderableType]:
    """A panel with the test example, and a table with its proponents and opponents.

    Words of the test example are shaded by their summed share over the proponents shown.
    """
    summed: dict[int, float] = {}
    for influential in proponents:
        for token, term in influential.terms.items():
            summed[token] = summed.get(token, 0.0) + term
    heading = title if test.label is None else f"{title}, label {test.label}"
    table = Table(expand=True, show_lines=False, header_style="bold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("train", justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True, max_width=14)
    table.add_column("text", ratio=1, overflow="fold")
    for name, influentials in (("proponents", proponents), ("opponents", opponents)):
        table.add_row(Text(name, style="italic"), "", "", "", end_section=False)
        for influential in influentials:
            table.add_row(
                f"{influential.score:+.3g}",
                str(influential.train_index),
                influential.example.label or "",
                shaded(influential.example, influential.terms, influential.score),
            )
        table.add_section()
    return [Panel(shaded(test, summed, sum(summed.values())), title=heading, title_align="left"), table]


def shaded(example: Example, terms: Mapping[int, float], score: float) -> Text:
    """An example's text, each word shaded by the share of its term, by whether it pushed with the score or against."""
    total = sum(abs(term) for term in terms.values())
    text = Text()
    if not example.words:
        return Text("(no text stored)", style="dim italic")
    for token, word in list(zip(example.ids, example.words, strict=True))[:_MAX_TOKENS]:
        before, plain = _spaced(word)
        text.append(before if len(text) else "")
        term = terms.get(token, 0.0)
        text.append(plain, style=_style(abs(term) / total if total else 0.0, with_score=term * score >= 0))
    if len(example.words) > _MAX_TOKENS:
        text.append(" ...", style="dim")
    return text


def _style(share: float, *, with_score: bool) -> str:
    strong, medium, weak = _FOR if with_score else _AGAINST
    if share >= _STRONG:
        return strong
    if share >= _MEDIUM:
        return medium
    return weak if share >= _WEAK else ""


def _spaced(word: str) -> tuple[str, str]:
    """The space before a token, and its text, by the marks of WordPiece, byte-level BPE and SentencePiece."""
    if word.startswith("##"):
        return "", word[2:]
    if word[:1] in ("Ġ", "▁"):
        return " ", word[1:]
    return " ", word
