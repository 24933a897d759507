"""Pictures of the HTML page of a result: of a desktop and of a phone, light and dark, taken by headless Chromium.

python -m examples.topics                                          # leaves demo_output/page.html
python examples/screenshots.py demo_output/page.html docs          # docs/page-light.png, docs/page-phone-dark.png, ...
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SCREENS = (("page", 1280, 900), ("page-phone", 390, 844))

_COLOURS = 256  # of a picture, which would be larger than 300 KB with all of them


@contextmanager
def chromium() -> Iterator[Any]:
    """The Chromium that the system has, running without a window.

    Raises:
        FileNotFoundError: if there is none.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "google-chrome", "chromium-browser")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise FileNotFoundError("Chromium is needed to show the HTML page: install it (apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="what result.to_html wrote")
    parser.add_argument("folder", type=Path, help="where the pictures are put")
    parser.add_argument("--example", type=int, default=0, help="the row of the test example that is shown")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    address = f"{options.page.resolve().as_uri()}#test-{options.example}"
    with chromium() as browser:
        for (name, width, height), scheme in product(_SCREENS, ("light", "dark")):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(address)
            word = page.locator(".card .level-4, .card .level-5").first
            if width > 1000 and word.count():
                word.hover()
            (options.folder / f"{name}-{scheme}.png").write_bytes(_small(page.screenshot()))
            page.close()


def _small(picture: bytes) -> bytes:
    """The same PNG in fewer colours."""
    from PIL import Image

    file = io.BytesIO()
    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)
    few.save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
