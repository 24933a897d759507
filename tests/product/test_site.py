"""The site of the documentation: every public name is in its reference, and its scripts are those of the README."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
PUBLIC = [f"lightning_tracin{part}" for part in ("", ".cli", ".metrics", ".metrics.functional", ".retraining")]


def complete_script(page: str) -> str:
    """The Python block of a page that holds a fit and a page."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (script,) = (block for block in blocks if "import csv" in block)
    return script


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_reference(package):
    module = import_module(package)
    listed = re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE)
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            continue
        assert f"{value.__module__}.{value.__qualname__}" in listed, name


def test_what_the_reference_lists_exists():
    for path in re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE):
        module, name = path.rsplit(".", 1)
        assert getattr(import_module(module), name).__doc__, path


def test_the_site_starts_with_the_script_of_the_readme():
    assert complete_script("docs/start.md") == complete_script("README.md")


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(bool(re.fullmatch(r"\|[-:| ]*-[-:| ]*\|", line)) for line in lines) <= 3  # tables


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned_by_their_hash(workflow):
    uses = re.findall(r"uses: (\S+)", workflow.read_text(encoding="utf-8"))
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", each) for each in uses)
