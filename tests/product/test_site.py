"""The site of the documentation: every public name is in its reference, and its scripts are those of the README."""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType

import pytest
from fences import ROOT, blocks

REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
PUBLIC = [f"lightning_tracin{part}" for part in ("", ".cli", ".metrics", ".metrics.functional", ".retraining")]


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
    (of_the_site,), (of_the_readme,) = blocks("docs/start.md", "python"), blocks("README.md", "python")
    assert of_the_site.text == of_the_readme.text


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(bool(re.fullmatch(r"\|[-:| ]*-[-:| ]*\|", line)) for line in lines) <= 3  # tables


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned_by_their_hash(workflow):
    uses = re.findall(r"uses: (\S+)", workflow.read_text(encoding="utf-8"))
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", each) for each in uses)
