"""axe-core finds no fault in any view of a page, on a desktop and on a phone, light and dark."""

from __future__ import annotations

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from chromium import DESKTOP, PHONE, opened
from pages import Table, example, explanation, issues_of, page_of

from lightning_tracin.report.explanation import Example, Influential, Word
from lightning_tracin.report.page import write_page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page of everything that pages can hold."""
    words = (
        Word("[CLS]", "", (0,), special=True),
        Word("Ask", " ", (1,), is_prompt=True),
        Word("the", " ", (2,), is_common=True),
        Word("£900", " ", (3, 4), pieces=("£", "900")),
        *(Word(f"w{place}", " ", (place,), tag="LOC") for place in range(5, 10)),
    )
    ids = tuple(range(10))
    terms = (0.05, 0.01, 0.2, 0.5, 0.02, 0.05, -0.1, -0.2, -0.4)
    parts, stops = ("[CLS]", "Ask", "the", "£…", *ids[5:]), (True, False, True, *(False,) * 6)
    test = Example(0, words, "news", "sport", 0.6, " that was not read", ids, target="sport", loader="validation")
    pairs = [
        Influential(Example(index, words, label, unread=" more", ids=ids), score, 0.5, terms, parts, stops, (7, 9))
        for index, (label, score) in enumerate((("news", 1.0), ("sport", -2.0)))
    ]
    page = page_of(
        [explanation(0, test, *pairs), explanation(1, example(1, ()))],
        notes=["What is missing.", "What would bring it."],
        suspects=issues_of(*pairs, predicted="sport"),
        word_table=Table(("goal", "fig", "\n"), ("news", "sport"), ("news", "sport"), torch.randn(3, 2, 2)),
        target="prediction",
    )
    return write_page(page, tmp_path_factory.mktemp("full") / "page.html")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A page of a result whose trace is gone, by a method without words."""
    return write_page(page_of([explanation(0, example(0, ()))]), tmp_path_factory.mktemp("bare") / "page.html")


def faults(page):
    """What axe-core finds, and where first."""
    found = Axe().run(page).response["violations"]
    return [
        (each["impact"], each["id"], each["nodes"][0]["target"], each["nodes"][0]["failureSummary"]) for each in found
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_on_a_desktop(browser, full, scheme):
    with opened(browser, full, viewport=DESKTOP, color_scheme=scheme, reduced_motion="reduce") as page:
        page.click(".notes summary")
        page.locator(".card .word").last.hover()
        assert faults(page) == []
        page.click(".card .link >> nth=0")
        assert faults(page) == []
        page.keyboard.press("Escape")
        for tab in ("suspects", "words"):
            page.click(f"#tab-{tab}")
            assert faults(page) == []
        page.click("#tab-tests")
        page.fill("#search", "nothing like that")
        assert page.locator("#none").is_visible()
        assert faults(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_list_and_an_example_on_a_phone(browser, full, scheme):
    with opened(browser, full, viewport=PHONE, color_scheme=scheme) as page:
        assert faults(page) == []
        page.click(".row >> nth=0")
        assert faults(page) == []


def test_a_page_without_words_and_self_influence(browser, bare):
    with opened(browser, bare) as page:
        assert faults(page) == []
        page.click("#tab-suspects")
        assert faults(page) == []
