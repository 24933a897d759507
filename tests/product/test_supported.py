"""docs/supported.md: every row names a test that exists, and every family of models has a row."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # what pytest needs there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| what |")
]
NEVER_RUN = "never run"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_names_a_test_that_exists(row):
    _, far, named = row
    tests = re.findall(r"`(tests/\S+?\.py)::(\w+)`", named)
    assert tests or far == NEVER_RUN
    for file, name in tests:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_family_has_a_row():
    named = {name for row in ROWS for name in re.findall(r"`([\w-]+)`", row[0])}
    assert FAMILIES.keys() <= named


def test_the_python_is_one_that_the_project_names():
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:2])))


def test_the_oldest_versions_are_those_that_the_project_names():
    """Each lower bound of pyproject.toml is what `make oldest` installs."""
    lines = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = map(Requirement, (line for line in lines if "==" in line and not line.startswith("#")))
    oldest = {each.name: Version(str(each.specifier).removeprefix("==")) for each in pinned}
    for required in map(Requirement, PROJECT["dependencies"]):
        assert all(
            oldest[required.name] == Version(each.version) for each in required.specifier if each.operator == ">="
        )
