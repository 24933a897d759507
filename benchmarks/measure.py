"""Timing in turns, peak memory of a command, and tables that are printed and written as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One figure.

    Attributes:
        what: what was measured.
        value: the figure.
        unit: "x" for a ratio, "s", "MB", ...
        limit: what it should be at most ("<= 1.05") or at least (">= 50"), if anything.
        details: what the figure is made of.
    """

    what: str
    value: float | None
    unit: str = "x"
    limit: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        if not self.limit or self.value is None:
            return None
        sign, bound = self.limit.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def in_turns(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, A B A B, after one turn of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios turn by turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def peak_megabytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """What ``python -m module arguments`` prints as its last line, JSON; its memory is its own.

    Raises:
        RuntimeError: if it fails; the message ends with what it said last.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, env={**os.environ}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join([module, *arguments])} failed ({done.returncode}): {last}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a table's arguments, with ``--out``."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    return arguments


def report(name: str, title: str, rows: Sequence[Row], out: Path) -> None:
    """Print a table, and write it as ``out/name.json``."""
    table = Table(title=title, title_justify="left")
    for column in ("figure", "value", "limit", ""):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left")
    for row in rows:
        value = "not measured" if row.value is None else f"{row.value:,.3g} {row.unit}"
        mark = {None: "", True: "[green]kept[/]", False: "[red]missed[/]"}[row.met]
        table.add_row(row.what, value, row.limit, mark or str(row.details.get("reason", "")))
    Console(width=120).print(table)
    out.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    content = {"title": title, "machine": machine, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
