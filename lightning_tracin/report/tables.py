"""The terminal: a test example and who pushed it, each word shaded by what it adds to the score."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from lightning_tracin.gradients.printable import printable
from lightning_tracin.report.explanation import Example, Explanation, Influential
from lightning_tracin.report.palette import TERMINAL_AGAINST, TERMINAL_FOR

# A word is shaded by its term's share of the sum of all terms' magnitudes, from these on.
_STRONG, _MEDIUM, _WEAK = 0.2, 0.07, 0.02

_NOTHING = 0.005  # A smaller share would be printed as 0%: its word is not listed.

_LINES = 4  # A training example's text takes this many lines.

_EQUAL = 5  # So many training examples that say the same are named.

_UNREAD = 80  # So many characters are shown of the part of a text that the model was not given.


def explained(explanation: Explanation) -> RenderableType:
    """A panel with the test example, and below it its proponents and opponents, strongest first."""
    text = shaded(explanation.test, explanation.terms, sum(explanation.terms))
    parts: list[RenderableType] = [Panel(text, title=_title(explanation), title_align="left")]
    for name, influentials in (("Proponents", explanation.proponents), ("Opponents", explanation.opponents)):
        parts.append(Text(name if influentials else f"No {name.lower()}", style="bold"))
        parts += map(_Entry, influentials)
    return Group(*parts)


def shaded(
    example: Example, terms: Sequence[float], score: float, *, stops: Sequence[bool] = (), room: int | None = None
) -> Text:
    """An example's text, each word shaded by the share of its term, by whether it pushed with the score or against.

    Args:
        example: the example.
        terms: of each of its words; none leaves it plain.
        score: its sign says what is for and what is against.
        stops: whether each of its words shares stop words alone, which are grey; by default its words tell.
        room: characters; of a longer text the part that adds most to the score is shown.
    """
    if not example.words:
        return Text("(no text stored)", style="dim italic")
    total = sum(map(abs, terms))
    shown = _excerpt(example, terms, room)
    text = Text("… " if shown.start else "", style="")
    for number in shown:
        word, term = example.words[number], terms[number] if terms else 0.0
        if number > shown.start:
            text.append(printable(word.before))
        style = _style(abs(term) / total if total else 0.0, with_score=term * score >= 0)
        if word.special or (style and (stops[number] if stops else word.is_stop)):
            style = "dim underline" if style else "dim"
        text.append(printable(word.text), style=style or ("dim" if word.is_prompt else ""))
        if word.tag is not None:
            text.append(f"/{printable(word.tag)}", style="dim")
    if shown.stop < len(example.words):
        text.append(" …", style="dim")
    elif room is None and example.unread:
        text.append(printable(example.unread[:_UNREAD]), style="dim italic")
        text.append(" …" if len(example.unread) > _UNREAD else "", style="dim")
    return text


class _Entry:
    """A training example: a line of facts, one of words, and as many of its text as fit."""

    def __init__(self, influential: Influential) -> None:
        self.influential = influential

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        each = self.influential
        facts = Text.assemble((f"{each.score:+.3g}", "bold"), f"  train {each.example.index}")
        if each.share is not None:
            facts.append(f"  {each.share:.1%} of all {'proponents' if each.score >= 0 else 'opponents'}")
        if each.example.label is not None:
            facts.append(f"  label {printable(each.example.label)}")
        if each.equal:
            facts.append(f"  ({len(each.equal) + 1} equal texts: also {', '.join(map(str, each.equal[:_EQUAL]))}")
            facts.append(", …)" if len(each.equal) > _EQUAL else ")")
        facts.truncate(options.max_width - 2, overflow="ellipsis")
        yield Padding(facts, (0, 0, 0, 2))
        words = _words(each)
        if words:
            words.truncate(options.max_width - 4, overflow="ellipsis")
            yield Padding(words, (0, 0, 0, 4))
        room = _LINES * (options.max_width - 4)
        text = shaded(each.example, each.terms, each.score, stops=each.stops, room=room)
        text.overflow = "fold"
        yield Padding(text, (0, 0, 1, 4))


def _words(of: Influential) -> Text:
    """The strongest words, each with its part of all their magnitudes; a minus says that it is against the score."""
    total = sum(abs(word.term) for word in of.listed_words(len(of.terms)))
    words = Text()
    for name, term, is_stop in of.listed_words():
        share = abs(term) / total
        if share < _NOTHING:
            continue
        words.append(", " if words else "words: ", style="italic")
        against = "−" if term * of.score < 0 else ""
        words.append(f"{printable(name)} {against}{share:.0%}", style="dim italic" if is_stop else "italic")
    return words


def _excerpt(example: Example, terms: Sequence[float], room: int | None) -> range:
    """The words that fit into a number of characters and add most to the score: of equal ones, the first."""
    lengths = [len(word.before) + len(word.text) for word in example.words]
    if room is None or sum(lengths) <= room:
        return range(len(lengths))
    weights = [abs(term) for term in terms] or [0.0] * len(lengths)
    best = (-1.0, range(1))
    start, length, weight = 0, 0, 0.0
    for stop in range(len(lengths)):
        length, weight = length + lengths[stop], weight + weights[stop]
        while length > room and start < stop:
            length, weight, start = length - lengths[start], weight - weights[start], start + 1
        if weight > best[0] * (1 + 1e-9) + 1e-300:
            best = (weight, range(start, stop + 1))
    return _filled(best[1], lengths, room)


def _filled(chosen: range, lengths: Sequence[int], room: int) -> range:
    """A run of words made longer, first at its beginning, until the room is used up."""
    start, stop = chosen.start, chosen.stop
    length = sum(lengths[start:stop])
    while start > 0 and length + lengths[start - 1] <= room:
        start, length = start - 1, length + lengths[start - 1]
    while stop < len(lengths) and length + lengths[stop] <= room:
        stop, length = stop + 1, length + lengths[stop]
    return range(start, stop)


def _title(explanation: Explanation) -> Text:
    test = explanation.test
    title = Text(f"Test example {test.index}")
    if test.loader is not None:
        title.append(f" of {printable(test.loader)}")
    if test.label is not None:
        title.append(f", label {printable(test.label)}")
    if test.prediction is not None:
        title.append(f", prediction {printable(test.prediction)}", style="bold" if test.is_mistaken else "")
        title.append("" if test.confidence is None else f" ({test.confidence:.0%})")
    if test.target is not None:
        title.append(f", target {printable(test.target)}")
    if explanation.row != test.index:  # by which result.show and result.words ask for it
        title.append(f", row {explanation.row}")
    return title


def _style(share: float, *, with_score: bool) -> str:
    styles = TERMINAL_FOR if with_score else TERMINAL_AGAINST
    if share >= _STRONG:
        return styles.strong
    if share >= _MEDIUM:
        return styles.medium
    return styles.weak if share >= _WEAK else ""
