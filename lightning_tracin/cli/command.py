"""The command ``lightning-tracin``: looks into traces and results without a model.

Data goes to stdout, all else to stderr. The exit code is 0 if all is well, 1 if something is wrong with what was asked
about (not found, damaged), 2 if the command line is.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

import lightning_tracin
from lightning_tracin.cli import argument_types as types
from lightning_tracin.cli.estimate import NOTES, add_arguments, as_json, estimated, size_table
from lightning_tracin.cli.help_notes import (
    EXPORT_NOTES,
    HTML_NOTES,
    INFO_NOTES,
    LABELS_NOTES,
    TOP_NOTES,
    VERIFY_NOTES,
)
from lightning_tracin.gradients.printable import STEERING, in_a_cell, printable

if TYPE_CHECKING:
    from lightning_tracin.report.explanation import Explanation

_PLAIN_WIDTH = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments; by default those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: on ``--help``, ``--version`` and a wrong command line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # or a word that the terminal has no signs for would be an error
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        _close_output()
        return 0
    except KeyboardInterrupt:
        return 130  # what a shell makes of Ctrl-C


def _run(argv: Sequence[str] | None) -> int:
    """Run a command; see :func:`main`."""
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError, IndexError, ModuleNotFoundError) as error:
        _tell(f"error: {error}")
        if isinstance(error, OSError):
            _close_output()
        return 1
    return code


def _close_output() -> None:
    """Write nothing more, or Python would complain when it exits that it cannot."""
    for stream in (sys.stdout, sys.stderr):
        if not _flushed(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flushed(stream: TextIO) -> bool:
    """Whether what was written could be."""
    try:
        stream.flush()
    except OSError:
        return False
    return True


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-tracin",
        description="Look into what a fit with TracInCallback recorded, and into the influence computed from it.",
        epilog="exit codes: 0 all is well, 1 something is damaged or not found, 2 wrong command line\n"
        "help on a command: lightning-tracin COMMAND --help",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightning-tracin {lightning_tracin.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Namespace], int], help_text: str, notes: str) -> ArgumentParser:
        added = commands.add_parser(
            name, help=help_text, description=help_text, epilog=notes, formatter_class=RawDescriptionHelpFormatter
        )
        added.set_defaults(run=run, usage_error=added.error)
        return added

    info = command("info", _info, "What a trace holds, and how much space it takes.", INFO_NOTES)
    info.add_argument("trace", metavar="TRACE", type=types.path, help="folder that TracInCallback wrote")
    info.add_argument("--json", action="store_true", help="print one JSON object; sizes are in bytes")

    top = command("top", _top, "The training examples that pushed test examples most.", TOP_NOTES)
    of_path = "file of a result; with --result, folder of its trace"
    top.add_argument("path", metavar="RESULT | TRACE", type=types.path, help=of_path)
    of_result = "file of the result, where its trace has moved to TRACE"
    top.add_argument("--result", metavar="FILE", type=types.path, help=of_result)
    _add_k(top, 10)
    top.add_argument(
        "--test", metavar="I", type=int, nargs="+", action="extend", help="rows of the scores, from 0; all by default"
    )

    html = command("html", _html, "Write a result as a page for reading.", HTML_NOTES)
    _add_result(html)
    of_page = "the page, usually *.html"
    html.add_argument("-o", "--output", metavar="FILE", required=True, type=types.written_file, help=of_page)
    _add_k(html, 20)

    export = command("export", _export, "Write the strongest pairs of a result as a table.", EXPORT_NOTES)
    _add_result(export)
    forms = export.add_mutually_exclusive_group(required=True)
    forms.add_argument("--csv", metavar="FILE", type=types.path, help="write CSV with a header; - is stdout")
    of_json = "write a JSON list of objects, one a line; - is stdout"
    forms.add_argument("--json", metavar="FILE", type=types.path, help=of_json)
    of_parquet = "write Parquet; needs lightning-tracin[parquet]"
    forms.add_argument("--parquet", metavar="FILE", type=types.written_file, help=of_parquet)
    _add_k(export, 10)

    labels = command("labels", _labels, "Training examples whose labels may be wrong.", LABELS_NOTES)
    _add_result(labels)
    of_csv = "write all as CSV, to review and correct; - is stdout"
    labels.add_argument("--csv", metavar="FILE", type=types.path, help=of_csv)
    labels.add_argument("-n", type=types.positive, help="only the first so many")

    verify = command("verify", _verify, "Check every file of a trace against its checksum.", VERIFY_NOTES)
    verify.add_argument("trace", metavar="TRACE", type=types.path, help="folder that TracInCallback wrote")

    add_arguments(command("estimate", _estimate, "What a trace will take on disk, before a fit.", NOTES))
    return parser


def _info(arguments: Namespace) -> int:
    """Print what a trace holds."""
    content = _trace_content(lightning_tracin.Trace(arguments.trace))
    if arguments.json:
        sys.stdout.write(_json(content, indent=2) + "\n")
        return 0
    facts = {
        "trace": content["path"],
        "model": printable(content["model_class"]),
        "training examples": _n_examples(content),
        **{printable(f"site {site['name']}"): _described(site) for site in content["sites"]},
        "gradients": content["dtype"],
        "texts": "stored" if content["has_texts"] else "not stored",
        "size": decimal(content["bytes"]),
        **{f"note {number}": printable(note) for number, note in enumerate(content["notes"], start=1)},
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    _print(table, "", _checkpoint_table(content))
    return 0


def _n_examples(content: dict[str, Any]) -> str:
    """How many examples there are, and how many of them no batch has held."""
    n_train, n_undrawn = content["n_train"], content["n_undrawn"]
    others = f" of {n_train:,} in the data set; the others were never drawn" if n_undrawn else ""
    return f"{n_train - n_undrawn:,}{others}{'; candidates, not trained on' * content['candidates']}"


def _trace_content(trace: lightning_tracin.Trace) -> dict[str, Any]:
    """What a trace holds, as JSON."""
    checkpoints = [
        {
            "step": each.step,
            "epoch": each.epoch,
            "learning_rates": {site.name: each.learning_rate_of(site) for site in trace.sites},
            "keeps_weights": each.keeps_weights,
            "gradients": [site.name for site in trace.sites if each.has_gradients(site)],
            "bytes": {
                "weights": _bytes(each.path / "weights.safetensors"),
                "second_moments": sum(map(_bytes, each.path.glob("second-moments-*.safetensors"))),
                **{site.name: _bytes(each.path / site.key) for site in trace.sites},
            },
        }
        for each in trace.checkpoints
    ]
    return {
        "path": str(trace.path),
        "id": trace.id,
        "model_class": trace.model_class,
        "n_train": trace.n_train,
        "n_undrawn": len(trace.undrawn),
        "candidates": trace.header.candidates,
        "notes": list(trace.header.notes),
        "sites": [asdict(site) for site in trace.sites],
        "dtype": trace.dtype,
        "has_texts": trace.has_texts,
        "checkpoints": checkpoints,
        "bytes": _bytes(trace.path),
    }


def _described(site: dict[str, Any]) -> str:
    """A site's layer, and what is stored there."""
    kept = [f"{name} {site[name]}" for name in ("top_words", "projection") if site[name]]
    return ", ".join([printable(site["layer"]), *([] if site["shape"] == "words" else [f"as {site['shape']}"]), *kept])


def _checkpoint_table(content: dict[str, Any]) -> Table:
    """The checkpoints of a trace, a row each."""
    names = [site["name"] for site in content["sites"]]
    table = Table(box=None, pad_edge=False)
    for column in ("step", "epoch", "learning rate", "weights", "moments", *names):
        table.add_column(printable(column), justify="right")
    for each in content["checkpoints"]:
        sizes = {name: decimal(size) for name, size in each["bytes"].items()}
        stored = [sizes[name] if name in each["gradients"] else "not stored" for name in names]
        rate = f"{each['learning_rates'][names[0]]:.3g}"
        weights = sizes["weights"] if each["keeps_weights"] else "not kept"
        table.add_row(str(each["step"]), str(each["epoch"]), rate, weights, sizes["second_moments"], *stored)
    return table


def _top(arguments: Namespace) -> int:
    """Print the strongest training examples of test examples."""
    if arguments.result is None and Path(arguments.path).is_dir():
        arguments.usage_error(f"{arguments.path} is a folder: pass the file of a result, or --result FILE with it")
    path, trace = (arguments.path, None) if arguments.result is None else (arguments.result, arguments.path)
    explanations = _result(path, trace).explanations(arguments.test, arguments.k)
    if Console().is_terminal:
        from lightning_tracin.report.tables import explained

        for explanation in explanations:
            _print(explained(explanation))
    else:
        for explanation in explanations:
            for record in _records(explanation):
                sys.stdout.write("\t".join(record) + "\n")
    return 0


def _records(explanation: Explanation) -> Iterator[list[str]]:
    """The fields of each pair of a test example, as the help says."""
    for role, influentials in (("proponent", explanation.proponents), ("opponent", explanation.opponents)):
        for rank, each in enumerate(influentials, start=1):
            yield [
                str(explanation.row),
                role,
                str(rank),
                str(each.example.index),
                f"{each.score:.9g}",
                "" if each.share is None else f"{each.share:.6g}",
                _one_line(each.example.label or ""),
                _one_line(each.example.text),
                " ".join(f"{_one_line(word)}={term:.3g}" for word, term in each.strongest_words()),
                _one_line(explanation.test.explained or ""),
            ]


def _html(arguments: Namespace) -> int:
    """Write a page."""
    _result(arguments.result, arguments.trace).to_html(arguments.output, arguments.k)
    return 0


def _export(arguments: Namespace) -> int:
    """Write the strongest pairs as a table."""
    from lightning_tracin.report.pairs import columns_of, words_in_a_line
    from lightning_tracin.storage.files import output_file

    result = _result(arguments.result, arguments.trace)
    if arguments.parquet is not None:
        try:
            frame = result.to_pandas(arguments.k)
            with output_file(Path(arguments.parquet)) as partial:
                frame.to_parquet(partial, index=False)
        except ImportError as error:
            message = "--parquet needs pandas and pyarrow: pip install lightning-tracin[parquet]"
            raise ModuleNotFoundError(message) from error
        return 0
    rows = result.rows(arguments.k)
    with _opened(arguments.csv or arguments.json) as file:
        if arguments.csv is not None:
            writer = csv.DictWriter(file, fieldnames=columns_of(rows), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                cells = {**row, "words": words_in_a_line(row["words"])}
                writer.writerow({name: _cell(value) for name, value in cells.items()})
        else:
            file.write("[\n" + ",\n".join(map(_json, rows)) + "\n]\n")
    return 0


def _labels(arguments: Namespace) -> int:
    """Print the training examples whose labels may be wrong, or write them."""
    issues = _result(arguments.result, arguments.trace).label_issues(n=arguments.n)
    if arguments.csv is None:
        _print(issues)
        return 0
    with _opened(arguments.csv) as file:
        issues.write_csv(file)
    return 0


def _verify(arguments: Namespace) -> int:
    """Name what is wrong with a trace's files."""
    from lightning_tracin.storage.verification import verify

    trace = lightning_tracin.Trace(arguments.trace)
    problems = []
    n_files = n_bytes = 0
    with _progress(_bytes(trace.path)) as advance:
        for path, problem in verify(trace):
            if problem is not None:
                problems.append(problem)
            n_files += 1
            n_bytes += _bytes(path)
            advance(_bytes(path))
    for problem in problems:
        sys.stdout.write(_one_line(problem) + "\n")
    if problems:
        _tell(f"{len(problems)} of {n_files} files in {trace.path} are not as they should be.")
        return 1
    sys.stdout.write(
        f"{printable(str(trace.path))}: all {n_files} files ({decimal(n_bytes)}) are as they were written.\n"
    )
    return 0


def _estimate(arguments: Namespace) -> int:
    """Print what a trace will take."""
    size = estimated(arguments)
    if arguments.json:
        sys.stdout.write(_json(as_json(size), indent=2) + "\n")
    else:
        _print(size_table(size), f"\n{size}")
    return 0


def _add_result(parser: ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", type=types.path, help="file that InfluenceResult.save wrote")
    parser.add_argument("--trace", metavar="TRACE", type=types.path, help="folder of its trace, where that has moved")


def _add_k(parser: ArgumentParser, default: int) -> None:
    parser.add_argument(
        "-k",
        type=types.positive,
        default=default,
        help=f"how many proponents and how many opponents ({default} by default)",
    )


def _result(path: str, trace: str | None) -> lightning_tracin.InfluenceResult:
    """A result; it is said if its texts cannot be shown."""
    result = lightning_tracin.InfluenceResult.load(path, trace)
    if result.trace is None and result.excerpt is None:
        _tell(
            "the trace of these scores is not where it was, or cannot be read: texts and words are missing. Pass the "
            "folder that it is in."
        )
    return result


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    """A file to write to, or stdout."""
    if path == "-":
        yield sys.stdout
    else:
        from lightning_tracin.storage.files import output_file

        with output_file(Path(path)) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            yield file


def _cell(value: Any) -> Any:
    """A cell of a table that a spreadsheet may open."""
    return in_a_cell(value) if isinstance(value, str) else value


def _json(content: Any, indent: int | None = None) -> str:
    """JSON in which signs that steer a terminal are escaped."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return STEERING.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


@contextmanager
def _progress(n_bytes: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal; yields a function that takes the number of bytes done."""
    console = Console(stderr=True)
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=hidden) as progress:
        yield partial(progress.advance, progress.add_task("", total=n_bytes))


def _print(*renderables: RenderableType) -> None:
    """Print for people: in colour on a terminal, as wide as it needs to be elsewhere."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    with console.capture() as captured:  # rich itself would exit with 1 where the reader has gone
        console.print(*renderables, sep="\n")
    sys.stdout.write(re.sub(" +\n", "\n", captured.get()))


def _tell(message: str) -> None:
    sys.stderr.write(f"lightning-tracin: {_one_line(message)}\n")


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder; 0 where there is neither."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0
