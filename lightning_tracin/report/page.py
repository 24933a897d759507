"""The HTML page: one file that needs nothing else.

Explanations become one JSON document inside the page, in which every word and every training example stands once;
``page.js`` and ``page_views.js``, which are one script in the page, draw what is looked at.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_tracin.gradients.printable import cleaned
from lightning_tracin.report.explanation import Example, Explanation, Influential, Word
from lightning_tracin.report.label_issues import COLUMNS, LabelIssue, LabelIssues
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.storage.files import output_file

_FOLDER = Path(__file__).parent

_ASSETS = ("page.js", "page_views.js", "page.css")

_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")  # These end a script early, or are halves of characters.

_TERM_STEPS = 9999  # The largest term of a pair is this many of the steps that its terms are rounded to.

_UNREAD = 160  # So many characters are shown of the part of a text that the model was not given.

_UNKNOWN = 2000  # So many characters are shown of a text whose words are not known.


#: What a word is on the page: its text, its token ids, what stands before it, what it is (:func:`_kind`), and its tag.
_WordOnPage: TypeAlias = tuple[str, tuple[int, ...], str, int, str | None]


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: its heading.
        facts: what stands below it, such as the numbers of examples.
        notes: what is missing, why, and what would bring it.
        n_train: number of training examples.
        explanations: of every test example, in the order of rows.
        suspects: the training examples whose labels may be wrong; None where that is not known.
        word_table: words over the whole test set, if the method has words.
        target: what of the test examples is explained.
    """

    title: str
    facts: Sequence[str]
    notes: Sequence[str]
    n_train: int
    explanations: Iterable[Explanation]
    suspects: LabelIssues | None
    word_table: WordTable | None
    target: str = "label"


def write_page(page: Page, path: str | Path) -> Path:
    """Write a page as one file, which appears whole or not at all.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    html = page_html(page)
    try:
        with output_file(path) as partial:
            partial.write_text(html, encoding="utf-8")
    except OSError as error:
        raise OSError(f"The page could not be written to {path}: {error.strerror}. Pass the path of a file.") from error
    return path


def page_html(page: Page) -> str:
    """The page as a string; its only script and style are allowed by their hashes, and nothing from elsewhere is."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    of_tests, of_views, style = ((_FOLDER / name).read_text(encoding="utf-8") for name in _ASSETS)
    # Inside a function, the names of the scripts stay out of the page's global scope.
    script = f'"use strict";\n(() => {{\n{of_tests}\n{of_views}}})();\n'
    return environment.get_template("page.html.j2").render(
        title=cleaned(page.title),
        facts=[cleaned(fact) for fact in page.facts],
        notes=[cleaned(note) for note in page.notes],
        has_word_table=page.word_table is not None,
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash_of(script),
        style_hash=_hash_of(style),
        data=Markup(json_in_html(_cleaned(_content(page)))),
    )


def json_in_html(content: Any) -> str:
    r"""JSON that can stand in a script element, whatever texts it holds.

    Example:
        >>> json_in_html("</script>")
        '"\\u003c/script\\u003e"'
    """
    dumped = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", dumped)


def _cleaned(content: Any) -> Any:
    """What JSON can hold, with every text of it without control characters and marks of direction."""
    if isinstance(content, str):
        return cleaned(content)
    if isinstance(content, dict):
        return {key: _cleaned(value) for key, value in content.items()}
    return [_cleaned(each) for each in content] if isinstance(content, (list, tuple)) else content


@dataclass
class _Collected:
    """What examples have in common, each once: words and training examples."""

    vocabulary: dict[_WordOnPage, int] = field(default_factory=dict)
    train: dict[int, list[Any]] = field(default_factory=dict)

    def words(self, example: Example) -> list[int]:
        """The numbers of an example's words."""
        return [self.vocabulary.setdefault(_on_page(word, example.ids), len(self.vocabulary)) for word in example.words]

    def pair(self, influential: Influential) -> list[Any]:
        """The training example's index, the score, the share, its equals, the parts of words, and the terms."""
        self._add(influential.example)
        return [
            influential.example.index,
            _rounded(influential.score),
            _rounded(influential.share),
            influential.equal,
            _parts(influential),
            *_packed(influential.terms),
        ]

    def suspect(self, issue: LabelIssue) -> list[Any]:
        """The training example's index, its self-influence, and what else the table of label issues has of it."""
        self._add(issue.example)
        return [
            issue.example.index,
            _rounded(issue.self_influence),
            issue.is_label_issue,
            _rounded(issue.label_score),
            issue.predicted_label,
            issue.rank,
            issue.rank_in_class,
        ]

    def _add(self, example: Example) -> None:
        if example.index not in self.train:
            self.train[example.index] = [example.label, self.words(example), _unread(example)]


def _content(page: Page) -> dict[str, Any]:
    """What the script of the page reads."""
    collected = _Collected()
    tests = [_test(explanation, collected) for explanation in page.explanations]
    suspects, table = page.suspects, page.word_table
    listed = None if suspects is None else [collected.suspect(each) for each in suspects.issues]
    return {
        "n_train": page.n_train,
        "target": page.target,
        "tests": tests,
        "train": collected.train,
        "vocabulary": [_without_defaults(word) for word in collected.vocabulary],
        "suspects": None
        if suspects is None
        else {
            "by": suspects.method,
            "n": suspects.n_train,
            "n_issues": suspects.n_issues,
            "agreement": suspects.agreement,
            "columns": COLUMNS,
            "rows": listed,
        },
        "word_table": None
        if table is None
        else {
            "words": table.words,
            "stops": [table.is_stop(number) for number in range(len(table.words))],
            "classes": table.classes,
            "labels": table.labels,
            "values": [[_rounded(value, 4) or 0 for value in row] for row in table.values.flatten(1).tolist()],
        },
    }


def _test(explanation: Explanation, collected: _Collected) -> dict[str, Any]:
    test = explanation.test
    return {
        "index": test.index,
        "loader": test.loader,
        "label": test.label,
        "prediction": test.prediction,
        "confidence": _rounded(test.confidence),
        "mistaken": test.is_mistaken,
        "target": test.target,
        "words": collected.words(test),
        "unread": _unread(test),
        "terms": _packed(explanation.terms),
        "proponents": [collected.pair(each) for each in explanation.proponents],
        "opponents": [collected.pair(each) for each in explanation.opponents],
    }


def _unread(example: Example) -> str:
    limit = _UNREAD if example.words else _UNKNOWN
    return example.unread if len(example.unread) <= limit else example.unread[:limit] + "…"


def _on_page(word: Word, ids: Sequence[int]) -> _WordOnPage:
    own = tuple(ids[place] for place in word.places) if ids else ()
    return word.text, own, word.before, _kind(word), word.tag


def _kind(word: Word) -> int:
    """What a word is: 1 a special token, 2 a common one, 4 one of a prompt, and sums of these."""
    return word.special + 2 * word.is_common + 4 * word.is_prompt


def _parts(of: Influential) -> list[Any]:
    """Of each word that is not shared whole: its place, what the part is called, and whether it is a stop word."""
    return [
        each
        for place, (word, part, is_stop, term) in enumerate(
            zip(of.example.words, of.parts, of.stops, of.terms, strict=False)
        )
        if term and part != word.text
        for each in (place, part, int(is_stop))
    ]


def _packed(terms: Sequence[float]) -> list[Any]:
    """Terms as a unit, and the place of each word that has one and its term in units."""
    known = {place: term for place, term in enumerate(terms) if term and math.isfinite(term)}
    if not known:
        return [0]
    unit = float(f"{max(map(abs, known.values())) / _TERM_STEPS:.6g}")
    packed: list[Any] = [unit]
    for place, term in known.items():
        packed += (place, round(term / unit))
    return packed


def _without_defaults(word: _WordOnPage) -> list[Any]:
    """Most words come after a space, are plain, and have no tag."""
    text, ids, before, kind, tag = word
    if kind or tag is not None:
        return [text, ids, before, kind, *([] if tag is None else [tag])]
    return [text, ids] if before == " " else [text, ids, before]


def _rounded(number: float | None, digits: int = 6) -> float | None:
    """As many digits as a float32 is sure of; None for what JSON has no number for."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.{digits}g}")


def _hash_of(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
