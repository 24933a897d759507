"""The documentation's commands: those of this package run, with the files that pages name; what others name exists."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
import shutil
import sys
from argparse import ArgumentParser
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch_files
from fences import PAGES, ROOT, blocks, page_text
from packaging.requirements import Requirement
from spellings import TEXTS, trained
from torch.distributed.run import get_args_parser
from transformers import BertConfig, BertModel

from lightning_tracin.cli.command import main as lightning_tracin

if sys.version_info >= (3, 11):
    import tomllib
else:  # what pytest needs there
    import tomli as tomllib

COMMAND_LINE = "docs/command_line.md"
NAMES = ["business", "sport", "tech"]
OUTPUTS = ("--output", "--html", "-o", "--csv")
BASH = [block for page in PAGES for block in blocks(page, "bash")]
# Commands amid the text, but for those whose arguments are left open (benchmarks.NAME).
INLINE = re.compile(r"`((?:python -m (?:benchmarks|examples)|make|pip install \"?lightning-tracin)(?![^`]*NAME)[^`]+)`")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """main.py and the configurations of a page, what they read, and what a fit and a query left behind."""
    folder = tmp_path_factory.mktemp("project")
    for block in [*blocks(COMMAND_LINE, "python"), *blocks(COMMAND_LINE, "yaml")]:
        name = block.text.partition("\n")[0].removeprefix("# ")
        (folder / name).write_text(block.text.replace("distilbert-base-uncased", "path/to/bert"), encoding="utf-8")
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *((text, NAMES[at % 3]) for at, text in enumerate(TEXTS))])
    tokenizer = trained("WordPiece")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for saved in (BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer):
        saved.save_pretrained(folder / "path" / "to" / "bert")
    shutil.copytree(folder / "path" / "to" / "bert", folder / "path" / "to" / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        main_py("fit", "-c", "config.yaml")
        main_py("influence", "-c", "config.yaml", "--output", "result.safetensors")
        keeping = ["ModelCheckpoint", "--trainer.callbacks.dirpath=runs", "--trainer.callbacks.save_top_k=-1"]
        main_py("fit", "-c", "config.yaml", "--trainer.callbacks", *keeping)
    return folder


def main_py(*arguments: str) -> None:
    """``python main.py``, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["main.py", *arguments])
        runpy.run_path("main.py", run_name="__main__")


class ParsedError(Exception):
    """A command line is right."""


def parses(module: str, arguments: list[str]) -> None:
    """Check that a module takes the arguments: benchmarks and examples run for minutes, or a night and a day."""
    taken = ArgumentParser.parse_args

    def parse(parser: ArgumentParser, given: list[str] | None = None, namespace: object = None) -> None:
        taken(parser, given, namespace)
        raise ParsedError

    found = import_module(module)
    found = import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ArgumentParser, "parse_args", parse)
        patched.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(ParsedError):
            found.main()


def require_targets(targets: list[str]) -> None:
    """Check that the Makefile has what is to be made, which may take hours, or needs PyPI."""
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(targets) <= set(rules)


def require_extras(wanted: list[str]) -> None:
    """Check that the package has the extras that are to be installed, for which an environment would be needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for each in wanted:
        requirement = Requirement(re.sub(r"^\.", project["name"], each))
        assert requirement.name == project["name"]
        assert requirement.extras <= project["optional-dependencies"].keys()


def check(words: list[str]) -> None:
    """Check a command that is not run: running takes other machines, hours, or PyPI."""
    match words:
        case ["python", "-m", module, *arguments]:
            parses(module, arguments)
        case ["make", *targets]:
            require_targets(targets)
        case ["pip", "install" | "download", "--no-deps", *_, wanted]:  # what the demo installs and fetches, too
            assert wanted in (ROOT / "Makefile").read_text(encoding="utf-8")
        case ["pip", "install", *wanted]:
            require_extras(wanted)
        case ["torchrun", *arguments]:  # of two nodes
            get_args_parser().parse_args(arguments)
        case ["git" | "cd" | "python3" | "." | "tar", *_]:  # a clone, and its environment; test_docs.py unpacks
            pass
        case _:
            pytest.fail(f"No test runs {shlex.join(words)}")


def run(line: str) -> None:
    """Run a line of bash, or check it."""
    words = []
    for word in shlex.split(line, comments=True):
        words += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    written = [Path(value) for option, value in pairwise(words) if option in OUTPUTS and value != "-"]
    for path in written:
        path.unlink(missing_ok=True)
    match words:
        case ["lightning-tracin", *arguments]:
            assert lightning_tracin(arguments) == 0
        case ["python", "main.py", *arguments]:
            main_py(*arguments)
        case ["python", "-c", code]:
            exec(code)
        case _:
            check(words)
    for path in written:
        assert path.stat().st_size > 0


@pytest.mark.parametrize(
    "block", [pytest.param(each, marks=torch_files.are_read if ".ckpt" in each.text else ()) for each in BASH], ids=str
)
def test_commands_run(block, project, tmp_path, monkeypatch):
    """One after the other, in a folder of their own."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for line in block.text.replace(" && ", "\n").splitlines():
        run(line)


@pytest.mark.parametrize("page", [page for page in PAGES if INLINE.search(page_text(page))])
def test_commands_amid_the_text_are_right(page):
    for command in INLINE.findall(page_text(page)):
        run(command)
