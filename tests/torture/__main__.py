"""``make torture``: everything that tries to break the package, and a table of what it found.

Each part runs in slices, in processes of their own with a limit on memory and on time: one that dies or hangs is
counted, and the others go on. The process ends with 1 if anything was found, or if less was tried than is asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

WRONG, FOREIGN, LOST = "wrong numbers", "foreign exceptions", "files lost"
OVER, LEFT, DIED = "over 1 GB or 10 s, or hung", "files left over", "slices that died"
BAD = (WRONG, FOREIGN, OVER, LOST, LEFT, DIED)

_BYTES = 8 * 2**30  # of address space, of which torch takes some without using it
_SECONDS = 900  # a slice takes a minute or two


@dataclass(frozen=True)
class Part:
    """One kind of trial.

    Attributes:
        name: what the table calls the trials.
        function: the module and the function, which takes how many, a seed and a folder, and returns a counter.
        least: how many trials there must be at the default setting.
        slice: what one process is asked for.
        tried: the keys that count trials; a key that ends in a colon stands for all that begin so.
        found: the keys that count what must not be, each with its row of the table.
    """

    name: str
    function: tuple[str, str]
    least: int
    slice: int
    tried: tuple[str, ...]
    found: dict[str, str]


_MUTATED = {"foreign:": FOREIGN, "unnamed:": FOREIGN, "not a number:": WRONG, "slow": OVER, "large": OVER}
_OWN = {each: each for each in (WRONG, FOREIGN, LOST, LEFT)}
PARTS = (
    Part("kills", ("torture.killer", "kills"), 300, 50, ("kills",), {**_OWN, "hangs": OVER}),
    Part(
        "mutated readings", ("mutations", "mutated_readings"), 30_000, 3_000, ("read", "refused", *_MUTATED), _MUTATED
    ),
    Part(
        "comparisons of training",
        ("untouched", "untouched_comparisons"),
        400,
        50,
        ("alike", "different"),
        {"different": WRONG},
    ),
    Part("property examples", ("torture.properties", "property_examples"), 500, 100, ("property examples",), _OWN),
)


def run_part(part: Part, scale: float, until: float, first_seed: int, folder: Path) -> Counter[str]:
    """Run slices until there are enough trials, or time is up."""
    counted: Counter[str] = Counter()
    began, number, least = time.monotonic(), 0, round(part.least * scale)
    while counted[part.name] < least and time.monotonic() < until:
        place = folder / part.name.replace(" ", "-") / str(number)
        found = run_slice(part, min(part.slice, least - counted[part.name]), first_seed + number, place)
        counted[part.name] += _sum(found, part.tried)
        for key, row in part.found.items():
            counted[row] += _sum(found, (key,))
        counted[DIED] += found[DIED]
        number += 1
        if counted[DIED] > 2:
            break
    counted["seconds"] = round(time.monotonic() - began)
    return counted


def run_slice(part: Part, n: int, seed: int, folder: Path) -> Counter[str]:
    """Run one slice in a process of its own; what it prints is shown."""
    folder.mkdir(parents=True)
    told = folder / "counted.json"
    command = [sys.executable, "-m", "torture", "--slice", part.name, "--n", n, "--seed", seed, "--folder", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [str(each) for each in command], env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        sys.stdout.write(f"{part.name}, seed {seed}: no end after {_SECONDS} s\n")
        return Counter({DIED: 1})
    sys.stdout.write(done.stdout)
    if not told.exists():
        sys.stdout.write(f"{part.name}, seed {seed}: ended with {done.returncode}\n{done.stderr[-3000:]}\n")
        return Counter({DIED: 1})
    return Counter(json.loads(told.read_text()))


def be_slice(part: Part, n: int, seed: int, folder: Path) -> None:
    """Run a slice in this process."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    (folder / "work").mkdir()
    module, function = part.function
    counted = getattr(import_module(module), function)(n, seed, folder / "work")
    (folder / "counted.json").write_text(json.dumps(counted))


def table_of(counted: dict[str, Counter[str]], scale: float) -> Table:
    table = Table("", *counted, title="make torture")
    table.add_row("tried", *(f"{of_part[name]:,}" for name, of_part in counted.items()))
    least = {part.name: round(part.least * scale) for part in PARTS}
    table.add_row("at least", *(f"{least[name]:,}" for name in counted), end_section=True)
    for row in (*BAD, "seconds"):
        table.add_row(row, *(f"{of_part[row]:,}" for of_part in counted.values()), end_section=row == BAD[-1])
    return table


def _sum(counted: Counter[str], keys: tuple[str, ...]) -> int:
    """How many there are under some keys, or beginnings of keys."""
    beginnings = tuple(key for key in keys if key.endswith(":"))
    return sum(n for key, n in counted.items() if key in keys or (beginnings and key.startswith(beginnings)))


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="after which no slice begins")
    parser.add_argument("--scale", type=float, default=1.0, help="how many trials, of the usual number")
    parser.add_argument("--processes", type=int, default=2, help="how many slices run at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[part.name for part in PARTS])
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--slice", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    by_name = {part.name: part for part in PARTS}
    if asked.slice:
        be_slice(by_name[asked.slice], asked.n, asked.seed, asked.folder)
        return 0
    parts = [part for part in PARTS if asked.only in (None, part.name)]
    until = time.monotonic() + 60 * asked.minutes
    with _place(asked.folder) as folder, ThreadPoolExecutor(asked.processes) as pool:
        jobs = {part.name: pool.submit(run_part, part, asked.scale, until, 1000 * asked.seed, folder) for part in parts}
        counted = {name: job.result() for name, job in jobs.items()}
    Console(width=120).print(table_of(counted, asked.scale))
    enough = all(counted[part.name][part.name] >= round(part.least * asked.scale) for part in parts)
    return int(not enough or any(of_part[row] for of_part in counted.values() for row in BAD))


if __name__ == "__main__":
    sys.exit(main())
