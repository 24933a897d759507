from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pandas as pd
import pytest
from stored_files import flipped, truncated
from toy import CLASSES, N_TEST, N_TRAIN, fitted, loader, test_texts

import lightning_tracin
from lightning_tracin import Trace
from lightning_tracin.cli.command import main
from lightning_tracin.report.pairs import words_in_a_line
from lightning_tracin.storage.files import read_json, write_json

COMMAND = ["-m", "lightning_tracin"]


@pytest.fixture(autouse=True)
def piped(monkeypatch):
    """The surroundings of a command whose output is piped."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def result(toy):
    return toy.influence(loader(test_texts()))


@pytest.fixture(scope="module")
def file(result, tmp_path_factory):
    return str(result.save(tmp_path_factory.mktemp("result") / "result.safetensors"))


@pytest.fixture
def copied(trace, tmp_path):
    """A copy of the trace, to be damaged."""
    return Path(shutil.copytree(trace, tmp_path / "copied"))


def run(*arguments) -> int:
    return main([str(each) for each in arguments])


def records(capsys):
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def failed(capsys, *arguments) -> str:
    """The one line that a command says when something is wrong with what it was asked about."""
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("lightning-tracin: error: ")
    return printed.err


def test_info_tells_what_lies_in_the_folder(trace, capsys):
    assert run("info", trace, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    opened = Trace(trace)
    header = json.loads((trace / "trace.json").read_text())
    assert {name: told[name] for name in ("id", "n_train", "model_class", "sites", "dtype")} == {
        name: header[name] for name in ("id", "n_train", "model_class", "sites", "dtype")
    }
    assert told["bytes"] == sum(
        (Path(folder) / name).stat().st_size for folder, _, names in os.walk(trace) for name in names
    )
    assert [(each["step"], each["epoch"]) for each in told["checkpoints"]] == [(5, 0), (10, 1)]
    for mine, its in zip(told["checkpoints"], opened.checkpoints, strict=True):
        assert mine["learning_rates"]["tracin-we"] == its.learning_rate
        assert mine["gradients"] == ["tracin-we", "tracin-last"]
        assert mine["bytes"]["weights"] == (its.path / "weights.safetensors").stat().st_size


def test_info_prints_aligned_columns(trace, capsys):
    assert run("info", trace) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "\x1b" not in printed
    assert not any(line.endswith(" ") for line in lines)
    assert re.search(r"^model +Toy$", printed, re.MULTILINE)
    assert re.search(rf"^training examples +{N_TRAIN}$", printed, re.MULTILINE)
    header, *rows = lines[-3:]
    assert header.split() == ["step", "epoch", "learning", "rate", "weights", "moments", "tracin-we", "tracin-last"]
    assert {len(row) for row in rows} == {len(header)}
    assert [row.split()[0] for row in rows] == ["5", "10"]


def test_info_says_which_gradients_are_not_stored_yet(tmp_path, capsys):
    fitted(tmp_path / "trace", cache="on_demand")
    assert run("info", tmp_path / "trace") == 0
    assert capsys.readouterr().out.count("not stored") == 5  # two methods at two checkpoints, and the texts


def test_top_prints_a_record_for_each_pair_where_it_is_piped(result, file, capsys):
    assert run("top", file, "-k", 3) == 0
    printed = iter(records(capsys))
    tops = {"proponent": result.proponents(3), "opponent": result.opponents(3)}
    for row in range(N_TEST):
        for role, top in tops.items():
            pushed = top.values[row] > 0 if role == "proponent" else top.values[row] < 0
            for rank in range(int(pushed.sum())):
                test, its_role, its_rank, train, score, share, label, text, words, target = next(printed)
                assert target == str(int(test_texts()[row][1]))
                index = int(top.indices[row, rank])
                assert (test, its_role, its_rank, train) == (str(row), role, str(rank + 1), str(index))
                assert float(score) == pytest.approx(float(top.values[row, rank]), rel=1e-8)
                assert (share == "") == (float(score) == 0) or 0 <= float(share) <= 1
                assert int(label) in range(CLASSES)
                assert text
                expected = [f"{word}={term:.3g}" for word, term in result.words(row, index)[:5] if term]
                assert sorted(words.split()) == sorted(expected)
    assert next(printed, None) is None


def test_top_takes_some_test_examples(file, capsys):
    assert run("top", file, "-k", 1, "--test", 4, 2, "--test", 0) == 0
    assert [record[0] for record in records(capsys)] == ["4", "4", "2", "2", "0", "0"]


def test_a_word_with_a_tab_or_a_line_break_does_not_break_a_record(file, copied, capsys):
    words = read_json(copied / "vocabulary.json")["words"]
    write_json(copied / "vocabulary.json", {"words": {token: f"{word}\t\nx" for token, word in words.items()}})
    assert run("top", copied, "--result", file) == 0
    assert {len(record) for record in records(capsys)} == {10}


@pytest.mark.parametrize("colour", [True, False])
def test_top_prints_tables_on_a_terminal(file, capsys, monkeypatch, colour):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take any file for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "72")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    assert run("top", file, "-k", 2, "--test", 1) == 0
    printed = capsys.readouterr().out
    assert "Test example 1" in printed
    assert bool(re.search(r"\x1b\[[0-9;]*[34]8;5", printed)) == colour  # sets one of 256 colours
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in printed.splitlines()) == 72


def test_top_finds_a_trace_that_has_moved(result, tmp_path, capsys):
    fit = fitted(tmp_path / "here")
    fit.influence(loader(test_texts())).save(tmp_path / "result.safetensors", k=0)
    assert run("top", tmp_path / "result.safetensors") == 0
    before = capsys.readouterr()
    assert before.err == ""
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert run("top", tmp_path / "result.safetensors") == 0
    without = capsys.readouterr()
    assert without.err.startswith("lightning-tracin: the trace of these scores is not where it was")
    assert all(re.search(r"\t\t\t\t\d$", line) for line in without.out.splitlines())  # no label, text or words
    assert run("top", tmp_path / "there", "--result", tmp_path / "result.safetensors") == 0
    assert capsys.readouterr() == before


def test_the_trace_of_another_fit_is_refused(file, tmp_path, capsys):
    fitted(tmp_path / "other")
    assert "is of another fit" in failed(capsys, "top", tmp_path / "other", "--result", file)
    assert "is of another fit" in failed(capsys, "export", file, "--trace", tmp_path / "other", "--csv", "-")


def test_csv_reads_back_as_to_pandas(result, file, tmp_path, capsys):
    assert run("export", file, "--csv", tmp_path / "pairs.csv", "-k", 4) == 0
    expected = result.to_pandas(4)
    expected["words"] = [words_in_a_line(words) for words in expected["words"]]
    exact = dict.fromkeys(("score", "share", "confidence"), float)  # pandas before 3 itself may miss the last digit
    texts = dict.fromkeys(expected.columns.difference([*exact, "test_row", "test_index", "rank", "train_index"]), str)
    read = pd.read_csv(tmp_path / "pairs.csv", dtype=texts, converters=exact, keep_default_na=False)
    pd.testing.assert_frame_equal(read, expected, check_exact=True)
    assert run("export", file, "--csv", "-", "-k", 4) == 0
    assert capsys.readouterr().out == (tmp_path / "pairs.csv").read_text()


def test_json_reads_back_as_to_pandas(result, file, tmp_path, capsys):
    assert run("export", file, "--json", tmp_path / "pairs.json") == 0
    text = (tmp_path / "pairs.json").read_text()
    pd.testing.assert_frame_equal(pd.DataFrame(json.loads(text)), result.to_pandas(10), check_exact=True)
    assert len(text.splitlines()) == len(result.to_pandas(10)) + 2  # a pair each, and the brackets
    assert run("export", file, "--json", "-") == 0
    assert capsys.readouterr().out == text


def test_parquet_reads_back_as_to_pandas(result, file, tmp_path):
    pytest.importorskip("pyarrow")
    assert run("export", file, "--parquet", tmp_path / "pairs.parquet") == 0
    read = pd.read_parquet(tmp_path / "pairs.parquet")
    read["words"] = [list(words) for words in read["words"]]
    pd.testing.assert_frame_equal(read, result.to_pandas(10), check_exact=True)


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_parquet_without_its_extra_names_it_and_csv_needs_none(file, tmp_path, monkeypatch, capsys, missing):
    if missing == "pandas":
        monkeypatch.setitem(sys.modules, "pandas", None)
    else:

        def without_pyarrow(*_, **__):
            raise ImportError("Unable to find a usable engine")

        monkeypatch.setattr(pd.DataFrame, "to_parquet", without_pyarrow)
    message = failed(capsys, "export", file, "--parquet", tmp_path / "pairs.parquet")
    assert "pip install lightning-tracin[parquet]" in message
    assert run("export", file, "--csv", tmp_path / "pairs.csv") == 0


def test_html_writes_the_page_of_the_result(result, file, tmp_path):
    assert run("html", file, "-o", tmp_path / "page.html", "-k", 7) == 0
    result.to_html(tmp_path / "expected.html", 7)
    assert (tmp_path / "page.html").read_text() == (tmp_path / "expected.html").read_text()


def test_verify_passes_what_a_fit_leaves_behind(trace, capsys):
    n_files = len(files_of(trace))
    assert run("verify", trace) == 0
    printed = capsys.readouterr()
    assert f"all {n_files} files" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("cache", ["training", "on_demand"])
def test_verify_passes_what_any_cache_leaves_behind(tmp_path, cache):
    fitted(tmp_path / "trace", cache=cache)
    assert run("verify", tmp_path / "trace") == 0


def files_of(trace) -> list[Path]:
    return sorted(path.relative_to(trace) for path in trace.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_verify_names_each_file_that_is_damaged(trace, copied, capsys, damage):
    names = [each for each in files_of(trace) if each.name != "trace.json"]
    assert len(names) == 2 * (1 + 3 + 2 + 2) + 3  # two checkpoints; the texts and the vocabulary
    for name in names:
        path = copied / name
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            truncated(path, path.stat().st_size // 2)
        else:
            flipped(path, 4 * path.stat().st_size)
        assert run("verify", copied) == 1
        printed = capsys.readouterr()
        assert str(path) in printed.out
        assert ("is missing" if damage == "missing" else "is damaged") in printed.out
        assert printed.out.count("\n") == 1
        assert printed.err.startswith("lightning-tracin: 1 of ")
        shutil.copy2(trace / name, path)
        assert run("verify", copied) == 0
        capsys.readouterr()


@pytest.mark.parametrize("key", ["checksums", "n_examples", "step"])
def test_verify_names_json_that_lacks_something(copied, capsys, key):
    name = "checkpoint.json" if key == "step" else "words/index.json"
    path = copied / "checkpoints" / "step-000000005" / name
    content = read_json(path)
    del content[key]
    write_json(path, content)
    assert run("verify", copied) == 1
    assert f"{path} is damaged: Object missing required field `{key}`" in capsys.readouterr().out


def test_verify_names_an_index_that_counts_other_examples(copied, capsys):
    path = copied / "texts" / "index.json"
    write_json(path, {**read_json(path), "n_examples": N_TRAIN + 1})
    assert run("verify", copied) == 1
    assert f"{path} is damaged: it counts {N_TRAIN + 1} examples" in capsys.readouterr().out


def test_verify_names_what_was_left_behind(copied, capsys):
    partial = copied / "checkpoints" / "step-000000015.partial"
    partial.mkdir()
    (copied / "vocabulary.json.0123abcd.partial").touch()
    assert run("verify", copied) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" was left behind")[0] for line in lines] == [
        str(partial),
        f"{copied}/vocabulary.json.0123abcd.partial",
    ]


def test_gradients_that_were_removed_on_purpose_are_no_damage(copied):
    shutil.rmtree(copied / "checkpoints" / "step-000000005" / "linear-0")
    assert run("verify", copied) == 0


def test_a_progress_bar_shows_on_a_terminal_only(forks, trace):
    reader, terminal = pty.openpty()
    done = forks.run(*COMMAND, "verify", trace, stderr=terminal, TERM="xterm")
    os.close(terminal)
    assert done.returncode == 0
    assert "checking" in os.read(reader, 100_000).decode()
    os.close(reader)
    assert done.stdout.startswith(f"{trace}: all ")


@pytest.mark.parametrize("command", [("info",), ("verify",)])
def test_a_folder_without_a_trace_is_told(tmp_path, capsys, command):
    assert f"There is no trace in {tmp_path}" in failed(capsys, *command, tmp_path)
    (tmp_path / "trace.json").write_text('{"version": 2, "id": "a"')
    assert f"{tmp_path}/trace.json is damaged" in failed(capsys, *command, tmp_path)
    (tmp_path / "trace.json").write_text('{"version": 2, "id": "a"}')
    assert "Object missing required field `n_train`" in failed(capsys, *command, tmp_path)
    write_json(tmp_path / "trace.json", {"version": 2, "id": "a"})
    assert "Object missing required field `n_train`" in failed(capsys, *command, tmp_path)


def test_what_is_no_result_is_told(tmp_path, file, capsys):
    assert "no.safetensors" in failed(capsys, "top", tmp_path / "no.safetensors")
    (tmp_path / "text").write_text("not a result")
    assert "holds no InfluenceResult, or is damaged" in failed(capsys, "export", tmp_path / "text", "--csv", "-")
    cut = shutil.copy(file, tmp_path / "cut")
    truncated(cut, 500)
    assert "holds no InfluenceResult, or is damaged" in failed(capsys, "html", cut, "-o", tmp_path / "page.html")
    assert "rows 0 to 5 (test examples 0 to 5 of the data set), but got 9" in failed(capsys, "top", file, "--test", 9)
    assert str(tmp_path / "text") in failed(capsys, "export", file, "--csv", tmp_path / "text" / "pairs.csv")


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_folders_of_exports_are_made(tmp_path, file, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    assert run("export", file, f"--{form}", tmp_path / "new" / "folder" / "pairs") == 0
    assert [each.name for each in (tmp_path / "new" / "folder").iterdir()] == ["pairs"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["show"],
        ["top"],
        ["top", "result", "-k", "0"],
        ["top", "result", "-k", "many"],
        ["top", "."],
        ["export", "result"],
        ["export", "result", "--csv", "-", "--json", "-"],
        ["export", "result", "--csv", ""],
        ["export", "result", "--json", ""],
        ["export", "result", "--parquet", ""],
        ["export", "result", "--parquet", "-"],
        ["html", "result"],
        ["html", "result", "-o", ""],
        ["html", "result", "-o", "-"],
        ["html", "result", "-o", "page.html", "--trace", ""],
        ["labels", "result", "--csv", ""],
        ["labels", ""],
        ["top", ""],
        ["top", "trace", "--result", ""],
        ["info", ""],
        ["verify", ""],
        ["estimate", "--trace", ""],
        ["estimate", "--examples", "5", "--model", ""],
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_how_it_goes(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: lightning-tracin")


@pytest.mark.parametrize("command", ["info", "top", "html", "export", "verify"])
def test_the_help_of_each_command_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    examples = re.findall(rf"^  lightning-tracin ({command} [^|&\n]+)", printed, re.MULTILINE)
    assert examples
    for example in examples:
        with pytest.raises(SystemExit) as ended:
            main([*example.split(), "--help"])
        assert ended.value.code == 0


def test_help_and_version_do_not_wait_for_torch():
    code = """
import sys
from lightning_tracin.cli.command import main
for arguments in (["--help"], ["--version"], ["top", "--help"]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code == 0
print("slow:", [name for name in ("torch", "pytorch_lightning", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "slow: []"


def test_what_needs_no_model_does_not_wait_for_lightning(file):
    code = f"""
import sys, lightning_tracin
assert "torch" not in sys.modules
print(lightning_tracin.TracInWE())
from lightning_tracin.cli.command import main
assert main(["top", {file!r}]) == 0
print([name for name in ("pytorch_lightning", "transformers", "pandas") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout.startswith("TracInWE(")


def test_the_script_is_this_command_and_tells_its_version():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (target,) = re.findall(r'^lightning-tracin = "(.+)"$', project, re.MULTILINE)
    assert resolve_name(target).__module__ == "lightning_tracin.__main__"  # what the next line runs
    done = subprocess.run([sys.executable, *COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lightning-tracin {lightning_tracin.__version__}\n"


@pytest.mark.parametrize("command", [["top", "-k", "20"], ["export", "--json", "-"]])
def test_a_reader_that_goes_away_is_no_error(forks, file, command):
    name, *options = command
    reader, writer = os.pipe()
    os.close(reader)
    done = forks.run(*COMMAND, name, file, *options, stdout=writer)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


def test_head_takes_the_first_record(forks, file, capsys):
    with subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
        done = forks.run(*COMMAND, "top", file, stdout=head.stdin)
        first, _ = head.communicate()
    run("top", file)
    assert first == capsys.readouterr().out.splitlines(keepends=True)[0]
    assert done.stderr == ""
    assert done.returncode == 0


def test_names_are_imported_when_they_are_asked_for():
    assert set(lightning_tracin.__all__) <= set(dir(lightning_tracin))
    assert lightning_tracin.querying.trainer.Trainer is lightning_tracin.Trainer  # modules are there as well
    with pytest.raises(AttributeError, match="no attribute 'Tracer'"):
        lightning_tracin.Tracer  # noqa: B018
