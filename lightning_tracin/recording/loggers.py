"""Tables of influential examples, and a page of them, for loggers, each in the form that it can show.

Loggers share no API for tables or files, and come twice, in ``pytorch_lightning`` and in ``lightning.pytorch``: those
of Lightning are told apart by the names of their classes, others by what they take. No package of a logger is imported.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import Any

from lightning_tracin.gradients.printable import in_a_cell, printable
from lightning_tracin.report.explanation import Explanation
from lightning_tracin.report.pairs import Row, rows_of_pairs, words_in_a_line

KEY, PAGE_KEY = "tracin/influential", "tracin/page"

FILE, PAGE = "influential.jsonl", "influential.html"

_CHARACTERS = 300  # of a text

_MARKS = re.compile(r"([\\`*_{}\[\]#|~])")


def rows_of(
    explanations: Sequence[Explanation], examples: Sequence[tuple[int, float]], *, step: int, epoch: int
) -> list[Row]:
    """The table of a validation: a line for each proponent and opponent of each example, if it pushed at all.

    The columns of :func:`~lightning_tracin.report.pairs.rows_of_pairs` follow those of the validation; ``test_row`` is
    the example's place among those that it logs, long texts are cut, words are on one line.

    Args:
        explanations: of the validation's examples.
        examples: of each, the number of its loader and its loss.
        step: the table is logged under.
        epoch: of the validation.
    """
    return [
        {"step": step, "epoch": epoch, "dataloader_idx": loader, "loss": loss, **_shown(row)}
        for explanation, (loader, loss) in zip(explanations, examples, strict=True)
        for row in rows_of_pairs(explanation)
    ]


def _shown(row: Row) -> Row:
    """A row of the table of pairs, as it can be shown."""
    cut = {name: shorten(printable(row[name]), _CHARACTERS, placeholder=" ...") for name in ("test_text", "train_text")}
    labels = {name: _printable(row[name]) for name in ("test_label", "prediction", "target", "train_label")}
    words = printable(words_in_a_line(row["words"]))
    return {**row, **cut, **labels, "words": words}


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown: a heading and a small table for each validation example."""
    parts = []
    for (loader, index), group in groupby(rows, key=lambda row: (row["dataloader_idx"], row["test_index"])):
        lines = list(group)
        first = lines[0]
        title = f"**Validation example {index}**" + (f" of loader {loader}" if loader else "")
        for name in ("test_label", "prediction"):
            title += "" if first[name] is None else f", {name.removeprefix('test_')} **{_plain(first[name])}**"
        title += "" if first["confidence"] is None else f" ({first['confidence']:.0%})"
        parts.append(f"{title}, loss {first['loss']:.3g}\n\n{_plain(first['test_text'])}\n")
        parts.append("| | score | share | train | label | strongest words | text |\n|---|--:|--:|--:|---|---|---|")
        for row in lines:
            share = "" if row["share"] is None else f"{row['share']:.1%}"
            cells = [_plain(row[name] or "") for name in ("train_label", "words", "train_text")]
            line = [f"{row['role']} {row['rank']}", f"{row['score']:+.3g}", share, str(row["train_index"]), *cells]
            parts.append(f"| {' | '.join(line)} |")
        parts.append("")
    return "\n".join(parts)


def check_loggers(loggers: Sequence[Any]) -> None:
    """Check that each logger's table can be written.

    Raises:
        ModuleNotFoundError: if one needs a package that is not there.
    """
    if any(_is(logger, "MLFlowLogger") for logger in loggers) and find_spec("pandas") is None:
        raise ModuleNotFoundError(
            "log_examples with an MLFlowLogger needs pandas: pip install lightning-tracin[pandas]"
        )


def log_table(logger: Any, rows: Sequence[Row], *, step: int, root: str) -> Path | None:
    """Hand a table to a logger.

    One that Lightning has not is given it by its own ``log_table(key, columns=, data=, step=)``, or as Markdown by
    ``log_text(key, text, step=)``; lines of JSON in a file are what is left, which ``log_file(path)`` takes if there is
    one, as LitLogger's.

    Args:
        logger: of Lightning, by either of its names, or another.
        rows: of the table, all with the same names.
        step: to log it under.
        root: folder for loggers that have none.

    Returns:
        The file that the table was appended to, if the logger takes no tables.
    """
    if not rows:
        return None
    columns = list(rows[0])
    values = [list(row.values()) for row in rows]
    if _is(logger, "TensorBoardLogger"):
        logger.experiment.add_text(KEY, markdown(rows), global_step=step)
    elif _is(logger, "MLFlowLogger"):  # appends to what is there
        data = {name: [row[name] for row in rows] for name in columns}
        logger.experiment.log_table(run_id=logger.run_id, data=data, artifact_file=f"{KEY}.json")
    elif _is(logger, "CometLogger"):
        name = f"{KEY.replace('/', '-')}-step-{step:09d}.csv"
        cells = [[in_a_cell(value) if isinstance(value, str) else value for value in line] for line in values]
        logger.experiment.log_table(name, tabular_data=cells, headers=columns)
    # W&B's, too: it logs the step as a value, as its metrics do, for W&B's own step only counts calls
    elif log := _taking(logger, "log_table", KEY, columns=columns, data=values, step=step):
        log(KEY, columns=columns, data=values, step=step)
    elif log := _taking(logger, "log_text", KEY, "", step=step):
        log(KEY, markdown(rows), step=step)
    else:
        file = logger_folder(logger, root) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        log = _taking(logger, "log_file", str(file))
        if log is None:
            return file
        log(str(file))
    return None


def log_page(logger: Any, page: Path, *, step: int) -> bool:
    """Hand an HTML page to a logger that takes files.

    Args:
        logger: of Lightning, by either of its names, or another.
        page: the file.
        step: to log it under.

    Returns:
        Whether it takes files.
    """
    if _is(logger, "WandbLogger"):
        html = sys.modules["wandb"].Html(page.read_text(encoding="utf-8"), inject=False)
        logger.experiment.log({PAGE_KEY: html, "trainer/global_step": step})
    elif _is(logger, "MLFlowLogger"):
        logger.experiment.log_artifact(logger.run_id, str(page), PAGE_KEY)
    elif _is(logger, "CometLogger"):
        logger.experiment.log_asset(str(page), file_name=f"{PAGE_KEY}/{page.name}", step=step)
    elif log := _taking(logger, "log_file", str(page)):
        log(str(page))
    else:
        return False
    return True


def logger_folder(logger: Any, root: str) -> Path:
    """Where a logger keeps the files of its run, or would."""
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root) / str(logger.name) / version


def _taking(logger: Any, name: str, *arguments: Any, **options: Any) -> Callable[..., Any] | None:
    """A method of a logger, if it has one that takes these arguments."""
    method = getattr(logger, name, None)
    if not callable(method):
        return None
    try:
        inspect.signature(method).bind(*arguments, **options)
    except TypeError:  # one of another meaning
        return None
    return method  # type: ignore[no-any-return]


def _is(logger: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(logger).__mro__)


def _printable(text: str | None) -> str | None:
    return None if text is None else printable(text)


def _plain(text: str) -> str:
    """Text in which nothing counts as Markdown or HTML."""
    return _MARKS.sub(r"\\\1", " ".join(text.split())).replace("<", "&lt;")
