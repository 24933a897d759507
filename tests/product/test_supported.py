"""docs/supported.md: every row names a test that exists, and every family of models has a row."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from families import FAMILIES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
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


def test_what_the_package_imports_it_asks_for():
    """By itself, and not because something else brings it; Lightning's other package is there or not."""
    declared = [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ]
    names = {canonicalize_name(Requirement(each).name) for each in declared} | {"lightning"}
    nodes = [
        node
        for path in (ROOT / "lightning_tracin").rglob("*.py")
        for node in run_imports(ast.parse(path.read_text(encoding="utf-8")))
    ]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules = {each.split(".")[0] for each in modules} - sys.stdlib_module_names - {"lightning_tracin"}
    distributions = packages_distributions()
    assert {each for each in modules if not names & set(map(canonicalize_name, distributions[each]))} == set()
    assert "markupsafe" in modules


def run_imports(node: ast.AST) -> Iterator[ast.AST]:
    """The imports below a node, but for those of type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from run_imports(child)
