"""Headless Chromium for pages that lie on the disk, and everything that goes wrong in them."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

import pytest
from screenshots import chromium

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def browsing():
    """A running browser; where there is none tests are skipped, except in CI, where they fail."""
    with ExitStack() as running:
        try:
            browser = running.enter_context(chromium())
        except FileNotFoundError as error:
            (pytest.fail if "CI" in os.environ else pytest.skip)(str(error))
        yield browser


@contextmanager
def opened(browser, path, **options):
    """A page of a file, which must end without an error, a dialog or a request to anywhere."""
    context = browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True, **options})
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints = []

    def answer(route):
        if route.request.url.split(":")[0] in ("file", "data", "blob"):
            route.continue_()
        else:
            complaints.append(f"request to {route.request.url}")
            route.abort()

    page.route("**/*", answer)
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not complaints, complaints
