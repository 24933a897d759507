"""The house: imports point downwards, and the core knows nothing of Lightning (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_tracin

PACKAGE = Path(lightning_tracin.__file__).parent
# From the top of the house to its ground: a folder may import itself and those that follow.
FLOORS = (
    "cli",
    "past",
    "retraining",
    "querying",
    "recording",
    "bridge",
    "results",
    "report",
    "scoring",
    "storage",
    "gradients",
    "parallel",
)
CORE = FLOORS[FLOORS.index("results") :]
# Below it: numbers that users pass, which every folder checks alike.
GROUND = "checked_numbers"
# Beside the house: judges scores, whoever made them, and knows tensors alone.
BESIDE = "metrics"
MAY_JUDGE = ("retraining",)  # the folders that use it
MODULES = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, also inside of functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[Path]:
    """The project's own modules that a file imports."""
    named = {Path(*name.split(".")[1:]) for name in imported(path) if name.startswith("lightning_tracin.")}
    return named & MODULES.keys()


def test_every_file_lives_on_a_floor():
    assert {module.parts[0] for module in MODULES if len(module.parts) > 1} == {*FLOORS, BESIDE}
    assert {module.name for module in MODULES if len(module.parts) == 1} == {
        "__init__",
        "__main__",
        GROUND,
    }


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downwards(floor):
    below = {*FLOORS[FLOORS.index(floor) :], BESIDE, GROUND}
    up = {
        f"{module} imports {each}"
        for module, path in MODULES.items()
        if module.parts[0] == floor
        for each in own_imports(path)
        if each.parts[0] not in below
    }
    assert not up


def test_no_imports_go_in_a_circle():
    left = {module: own_imports(path) for module, path in MODULES.items()}
    while free := {module for module, needs in left.items() if not needs & left.keys() - {module}}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left


def test_metrics_know_tensors_alone():
    """And those that keep states know the functions, not the other way round."""
    for module, path in MODULES.items():
        if module.parts[0] != BESIDE:
            continue
        assert {each.parts[0] for each in own_imports(path)} <= {BESIDE, GROUND}
        others = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert others <= {"lightning_tracin", "torch", "torchmetrics"}
        if module.parts[1] == "functional":
            assert all("functional" in each.parts for each in own_imports(path) if each.parts[0] == BESIDE)


def test_the_ground_needs_no_package():
    """Nothing that the command line loads before it must."""
    assert {name.split(".")[0] for name in imported(MODULES[Path(GROUND)])} <= sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_private_names_stay_at_home(module):
    """But for the halves of a metric's function, between which its class keeps the state."""
    halves = re.compile(rf"_{module.name}_(update|compute)")
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_tracin"):
            private = {alias.name for alias in node.names if alias.name.startswith("_")}
            assert not {name for name in private if module.parts[0] != BESIDE or not halves.fullmatch(name)}


def test_only_those_who_judge_import_metrics():
    for module, path in MODULES.items():
        if module.parts[0] not in (BESIDE, *MAY_JUDGE):
            assert not {name for name in imported(path) if name.startswith(f"lightning_tracin.{BESIDE}")}


@pytest.mark.parametrize("floor", [*CORE, BESIDE])
def test_the_core_does_not_import_lightning(floor):
    for module, path in MODULES.items():
        if module.parts[0] == floor:
            assert not {name for name in imported(path) if name.split(".")[0] in ("pytorch_lightning", "lightning")}


def test_the_core_runs_without_lightning():
    """Nothing that the core imports brings it along either."""
    core = [".".join(("lightning_tracin", *module.parts)) for module in MODULES if module.parts[0] in (*CORE, BESIDE)]
    script = (
        f"import importlib, sys\nfor name in {core}: importlib.import_module(name)\n"
        "assert not {'pytorch_lightning', 'lightning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("floor", [*FLOORS, BESIDE])
def test_every_floor_says_what_lives_there(floor):
    docstring = ast.get_docstring(ast.parse((PACKAGE / floor / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.splitlines()) > 2


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_and_signatures_are_small(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")]
            is_hook = node.name.startswith("on_") or node.name == "write_on_batch_end"  # Lightning's own signatures
            assert is_hook or len(names) <= 6, f"{node.name}{names}"
