"""The session's fit as a page in a browser."""

from __future__ import annotations

import pytest
from chromium import browsing, opened
from pages import K
from toy import loader, test_texts


@pytest.fixture(scope="module")
def browser():
    with browsing() as running:
        yield running


@pytest.fixture(scope="module")
def result(toy):
    return toy.influence(loader(test_texts()))


@pytest.fixture(scope="module")
def path(result, tmp_path_factory):
    return result.to_html(tmp_path_factory.mktemp("page") / "page.html", k=K)


@pytest.fixture
def page(browser, path):
    with opened(browser, path) as page:
        yield page
