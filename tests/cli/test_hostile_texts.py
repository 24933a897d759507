"""Texts and files of strangers on the command line: no sign steers the terminal, no traceback, no half of a file."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import loader, test_texts

from lightning_tracin import InfluenceResult, TracInLayer
from lightning_tracin.cli.command import main
from lightning_tracin.gradients.printable import STEERING
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.storage import files
from lightning_tracin.storage.files import read_json, write_json

COMMAND = ["-m", "lightning_tracin"]
EVIL = "\x1b[2J\x1b]0;gone\x07\x9b31m\u202etxt.exe\u2066\u200f[/red]"


@pytest.fixture
def evil(toy, tmp_path):
    """A result and its trace, whose texts are all a stranger's."""
    trace = Path(shutil.copytree(toy.callbacks[0].trace.path, tmp_path / "trace"))
    header = read_json(trace / "trace.json")
    sites = [{**site, "name": f"{site['name']}{EVIL}"} for site in header["sites"]]
    write_json(trace / "trace.json", {**header, "model_class": EVIL, "incomplete": EVIL, "sites": sites})
    words = read_json(trace / "vocabulary.json")["words"]
    write_json(trace / "vocabulary.json", {"words": {token: f"{word}{EVIL}" for token, word in words.items()}})
    result = toy.influence(loader(test_texts()))
    result.words_of_ids = {token: f"{word}{EVIL}" for token, word in result.words_of_ids.items()}
    result.label_names = {number: f"{number}{EVIL}" for number in range(3)}
    return result.save(tmp_path / "result.safetensors"), trace


def assert_harmless(printed: str) -> None:
    assert not STEERING.search(printed)
    assert "txt.exe" in printed  # the text itself is there


@pytest.mark.parametrize("command", ["info", "info --json", "top", "export --csv -", "export --json -"])
def test_no_sign_of_a_file_steers_the_terminal(evil, capsys, command):
    result, trace = evil
    name, *options = command.split()
    given = (
        [result, "--trace", trace] if name == "export" else [trace, "--result", result] if name == "top" else [trace]
    )
    assert main([name, *map(str, given), *options]) == 0
    printed = capsys.readouterr().out
    assert_harmless(printed)
    if "json" in command:
        content = json.loads(printed)
        assert EVIL in (content["model_class"] if name == "info" else content[0]["train_label"])  # data is exact


def test_tables_results_and_pages_are_harmless(evil, tmp_path):
    path, trace = evil
    result = InfluenceResult.load(path, trace)
    for shown in (str(result), str(result.word_table())):
        assert_harmless(shown)
    page = result.to_html(tmp_path / "page.html", title=EVIL).read_text(encoding="utf-8")
    assert_harmless(page.replace("\\u001b", "\x1b").replace("\\u202e", "\u202e"))


def test_a_word_table_without_a_trace_is_harmless():
    names, ones = (EVIL, "b"), torch.ones(2)
    table = WordTable(names, (False, True), names, names, torch.ones(2, 2, 2), torch.ones(2, 2), ones, ones, ones, 0)
    assert not STEERING.search(str(table))


def test_a_method_with_the_markup_of_rich_is_printed_as_it_is(toy):
    result = toy.influence(loader(test_texts()), method="tracin-last")
    result.method, result.trace = TracInLayer("[/red]"), None
    assert "TracInLayer(name='[/red]'" in str(result)


def test_errors_with_texts_of_files_are_on_one_harmless_line(evil, capsys):
    _, trace = evil
    write_json(trace / "trace.json", {**read_json(trace / "trace.json"), EVIL: 1})
    assert main(["info", str(trace)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert_harmless(told.removesuffix("\n"))


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1"])
def test_no_cell_of_a_table_is_a_formula(toy, tmp_path, text):
    result = toy.influence(loader(test_texts()))
    result.label_names = dict.fromkeys(range(3), text)
    path = result.save(tmp_path / "result.safetensors")
    assert main(["export", str(path), "--csv", str(tmp_path / "pairs.csv")]) == 0
    with (tmp_path / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["train_label"] for row in rows} == {"'" + text.replace("\r", "\n")}
    assert any(row["score"].startswith("-") for row in rows)  # numbers stay numbers
    assert {float(row["score"]) for row in rows} == {row["score"] for row in result.rows(10)}


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_no_half_of_an_export(toy, tmp_path, monkeypatch, capsys, form, before):
    path = toy.influence(loader(test_texts())).save(tmp_path / "result.safetensors")
    target = tmp_path / "out" / f"pairs.{form}"
    target.parent.mkdir()
    if before:
        target.write_text(before)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert main(["export", str(path), f"--{form}", str(target)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [each.name for each in target.parent.iterdir()] == ([target.name] if before else [])
    assert not before or target.read_text() == before


def test_an_export_to_a_device_or_through_a_link_goes_there(forks, toy, tmp_path):
    path = toy.influence(loader(test_texts())).save(tmp_path / "result.safetensors")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert main(["export", str(path), "--csv", str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    reader, writer = os.pipe()
    done = forks.run(*COMMAND, "export", path, "--csv", "/dev/stdout", stdout=writer)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    with os.fdopen(reader, "rb") as piped:
        assert piped.read() == (tmp_path / "real.csv").read_bytes()
    assert Path("/dev/null").is_char_device()
    assert main(["export", str(path), "--csv", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_a_full_standard_output_is_an_error_in_one_line(forks, trace):
    with Path("/dev/full").open("w") as full:
        done = forks.run(*COMMAND, "info", trace, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "lightning-tracin: error: [Errno 28] No space left on device\n"


def test_signs_that_the_terminal_has_not_are_escaped(trace, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(trace, tmp_path / "trace"))
    write_json(copied / "trace.json", {**read_json(copied / "trace.json"), "model_class": "Modèle"})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["info", str(copied)]) == 0
    sys.stdout.flush()
    assert rb"Mod\xe8le" in written.getvalue()


@pytest.mark.parametrize("after", [0.0, 0.3, 1.0])
def test_ctrl_c_is_quiet_while_modules_are_imported_and_later(trace, after):
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from lightning_tracin.__main__ import main\n"
    script += "import threading; threading.Timer(0.05, print, kwargs={'flush': True}).start()\nsys.exit(main())"
    arguments = [sys.executable, "-c", script, "verify", trace]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.readline()
        time.sleep(after)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert "Traceback" not in told
    assert running.returncode in (130, 0)


def test_help_whose_reader_has_gone_is_quiet():
    with subprocess.Popen(
        [sys.executable, *COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        writer.stdout.close()
        assert writer.stderr.read() == ""
        assert writer.wait() == 0
