"""Pages to test, made of little."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import torch

from lightning_tracin.report.explanation import Example, Explanation, Influential, Word
from lightning_tracin.report.label_issues import LabelIssue, LabelIssues
from lightning_tracin.report.page import Page

HOSTILE = ("<script>alert(1)</script>", "</script>", "<img src=x onerror=alert(1)>", "<!--", "&lt;b&gt;", "\u2028")


K = 4


@dataclass(frozen=True)
class Table:
    words: tuple[str, ...]
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    values: torch.Tensor

    def is_stop(self, word):
        return self.words[word] == "fig"


def example(index, words, label="news", **options):
    """Words, each of one token; the first two characters of a word are what its token says."""
    ids = tuple(sum(map(ord, word[:2])) for word in words)
    return Example(
        index, tuple(Word(word, " ", (place,)) for place, word in enumerate(words)), label, ids=ids, **options
    )


def page_of(explanations, **options):
    settings = {
        "title": "A page",
        "facts": ["TracIn-WE"],
        "notes": [],
        "n_train": 100,
        "explanations": explanations,
        "suspects": None,
        "word_table": None,
    }
    return Page(**{**settings, **options})


def explanation(row, test, *influentials):
    """Its proponents and opponents by the signs of their scores."""
    sides = [tuple(each for each in influentials if (each.score > 0) == positive) for positive in (True, False)]
    return Explanation(row, test, (1.0,) * len(test.words), *sides)


def issues_of(*influentials, predicted="news"):
    """Training examples as suspects, by their scores."""
    issues = [
        LabelIssue(each.example, True, 0.25, predicted, each.score, rank, rank)
        for rank, each in enumerate(influentials, start=1)
    ]
    return LabelIssues(issues, 100, len(issues), "TracIn-Last")


def hostile_page():
    words = (*HOSTILE, "=1+1", "fine")
    terms = tuple(float(number) for number in range(len(words)))
    test = example(0, words, "<b>label</b>", prediction="</script><script>alert(2)</script>", confidence=0.6)
    pairs = [
        Influential(example(1, words, "=cmd()"), sum(terms), 0.5, terms),
        Influential(example(2, ("@sum", "x"), '-a "quoted", label'), -1.0, 0.5, (-0.5, -0.5)),
    ]
    return page_of(
        [explanation(0, test, *pairs)],
        title="</title><script>alert(3)</script>",
        notes=["<script>alert(4)</script>"],
        suspects=issues_of(pairs[0], predicted="=<b>1</b>"),
        word_table=Table(words, ("<b>class</b>", ""), ("</script>", "+1"), torch.randn(len(words), 2, 2)),
    )


def data_of(html):
    """The JSON in a page, as a browser finds it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.S)[1])


def number(text):
    """What a number on the page says."""
    return float(text.replace("−", "-"))


def shown(page):
    """The indices of the test examples in the list."""
    return [int(text) for text in page.locator(".row .number").all_inner_texts()]
