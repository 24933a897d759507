"""The fenced blocks of the documentation, and where they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Without the changelog, which tells what once was.
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    if path.name != "CHANGELOG.md"
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a page; ``line`` is its first."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def run(self, names: dict[str, Any]) -> None:
        """Run it as Python, with names that it may use and add to; tracebacks show the page."""
        code = "\n" * (self.line - 1) + self.text
        exec(compile(code, ROOT / self.page, "exec", dont_inherit=True), names)


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", page_text(page))


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Those of a page, or those in one language."""
    text = page_text(page)
    found = [
        Block(page, text.count("\n", 0, fence.start(2)) + 1, fence[1], fence[2]) for fence in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]
