"""The HTML page of a large result: how long it takes to write, how large it is, and how quickly it answers.

The result is synthetic: words as frequent as in a natural text, training examples that are each listed many times.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, parser, peak_megabytes, report
from examples.screenshots import chromium
from lightning_tracin.report.explanation import Example, Explanation, Influential, Word
from lightning_tracin.report.label_issues import LabelIssue, LabelIssues
from lightning_tracin.report.page import Page, page_html, write_page

_LABELS = ("business", "entertainment", "politics", "sport", "tech")
_VOCABULARY = 20_000
# Does something, and tells after how many milliseconds the browser has drawn it.
_TIMED = """action => new Promise(drawn => {
    const began = performance.now();
    new Function(action)();
    requestAnimationFrame(() => setTimeout(() => drawn(performance.now() - began)));
})"""
_ACTIONS = {
    "another test example": "document.getElementById('next').click()",
    "a search": "const field = document.getElementById('search'); field.value = 'word17 ';"
    "field.dispatchEvent(new Event('input'))",
    "an order": "const field = document.getElementById('order'); field.value = 'strong';"
    "field.dispatchEvent(new Event('input'))",
    "following a training example": "document.getElementById('follow').close();"
    "document.querySelector('.card .link').click()",
    "a word pointed at": "document.querySelector('.card .word')"
    ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))",
}


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--tests", type=int, default=2000)
    arguments.add_argument("--k", type=int, default=50)
    arguments.add_argument("--examples", type=int, default=20_000, help="training examples")
    arguments.add_argument("--words", type=int, default=60, help="of each text")
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    texts = Texts(options.examples, options.words)
    began = time.perf_counter()
    for _ in texts.explanations(options.tests, options.k):
        pass
    made = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        page = texts.page(options.tests, options.k)
        began = time.perf_counter()
        path = write_page(page, Path(folder) / "page.html")
        written = time.perf_counter() - began - made
        size = path.stat().st_size / 1e6
        loads, actions = _browsed(path, options.repeats)
    report(
        f"page-{options.tests}x{options.k}",
        f"{options.tests:,} test examples with {options.k} proponents and {options.k} opponents each, of "
        f"{options.examples:,} training examples of {options.words} words",
        [
            Row("written, without the making of explanations", written, "s"),
            Row("size", size, "MB"),
            Row("of it without any example", len(page_html(texts.page(0, 0))) / 1e6, "MB"),
            Row("peak memory of writing", peak_megabytes(), "MB"),
            Row("loaded and drawn", statistics.median(loads), "ms"),
            *(Row(f"   {name}, first time", times[0], "ms") for name, times in actions.items()),
            *(Row(f"   {name}", statistics.median(times[1:]), "ms", "<= 100") for name, times in actions.items()),
        ],
        options.out,
    )


class Texts:
    """Random texts, and scores between them.

    Args:
        n_train: number of training examples.
        length: words of each.
    """

    def __init__(self, n_train: int, length: int) -> None:
        self._random = random.Random(0)
        self._length = length
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(_VOCABULARY)))
        self._train = [self._example(index) for index in range(n_train)]

    def page(self, n_test: int, k: int) -> Page:
        """A page of that many test examples."""
        suspects = [
            LabelIssue(example, True, 0.1, "sport", 1 / rank, rank, rank)
            for rank, example in enumerate(self._train[:50], 1)
        ]
        issues = LabelIssues(suspects, len(self._train), len(suspects), "TracIn-Last")
        return Page("Synthetic", [], [], len(self._train), self.explanations(n_test, k), issues, None)

    def explanations(self, n_test: int, k: int) -> Iterator[Explanation]:
        """Test examples with k proponents and k opponents each; words that both hold have terms."""
        for row in range(n_test):
            test = self._example(row, prediction=self._random.choice(_LABELS), confidence=self._random.random())
            sides = [
                tuple(
                    self._pair(test, example, sign / (rank + 1))
                    for rank, example in enumerate(self._random.sample(self._train, k))
                )
                for sign in (1, -1)
            ]
            terms = tuple(self._random.gauss(0, 1) for _ in test.words)
            yield Explanation(row, test, terms, *sides)

    def _example(self, index: int, **said: Any) -> Example:
        ranks = self._random.choices(range(_VOCABULARY), cum_weights=self._weights, k=self._length)
        words = tuple(Word(f"word{rank}", " ", (place,)) for place, rank in enumerate(ranks))
        return Example(index, words, self._random.choice(_LABELS), ids=tuple(ranks), **said)

    def _pair(self, test: Example, example: Example, score: float) -> Influential:
        shared = set(test.ids)
        terms = tuple(self._random.gauss(score, 1) if token in shared else 0.0 for token in example.ids)
        return Influential(example, score, 0.01, terms)


def _browsed(path: Path, repeats: int) -> tuple[list[float], dict[str, list[float]]]:
    """Milliseconds until a page is drawn, and until it has answered each action, in turn."""
    loads = []
    with chromium() as browser:
        for _ in range(repeats):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(60_000)
            began = time.perf_counter()
            page.goto(path.as_uri())
            page.locator(".card").first.wait_for()
            loads.append((time.perf_counter() - began) * 1e3)
            if len(loads) < repeats:
                page.close()
        actions = {}
        for name, action in _ACTIONS.items():
            actions[name] = [page.evaluate(_TIMED, action) for _ in range(repeats)]
            page.evaluate("document.getElementById('follow').close()")
    return loads, actions


if __name__ == "__main__":
    main()
