"""Chromium without a window, for pages that lie on the disk."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import sync_playwright

_NAMES = ("chromium", "google-chrome", "chromium-browser")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def chromium_path() -> str:
    """Where Chromium is; without it tests are skipped, except in CI, where they fail."""
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        missing = "Chromium is needed to test the HTML page: install it (apt-get install chromium)."
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    return path


@contextmanager
def chromium():
    """A running browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=_ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, **options):
    """A page of a file, which must end without an error, a dialog or a request to anywhere."""
    context = browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True, **options})
    page = context.new_page()
    page.set_default_timeout(5000)
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
