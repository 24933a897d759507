"""The study. What has been fitted is kept in a folder, and a run that was broken off goes on where it was.

python -m benchmarks.evidence --quick                        10 minutes, to see that all runs
python -m benchmarks.evidence                                a night and a day on 2 cores
python -m benchmarks.evidence --tasks sms-cnn --parts lds    a part of it
python -m benchmarks.evidence --tasks bbc-cnn --parts matters --ks 50    does_it_matter, as a user would ask
python -m benchmarks.evidence.page                           docs/evidence.md from the results
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.baselines.of_fit import BASELINES
from benchmarks.evidence.contenders import contenders
from benchmarks.evidence.deletion import Deletion, changes_of, deletion_table, with_seed
from benchmarks.evidence.fitting import Fitted, fitted, right_and_balanced
from benchmarks.evidence.halves import halves_of
from benchmarks.evidence.lds import lds_table
from benchmarks.evidence.matters import matters_table
from benchmarks.evidence.mislabel import disagreed, flipped, mislabel_table
from benchmarks.evidence.ours import Scorer
from benchmarks.evidence.scored import all_kept_scores, kept_scores
from benchmarks.evidence.shortlist import shortlist_table
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import TASKS, in_float32

_QUICK = {
    "tasks": ["bbc-cnn"],
    "methods": ["same label", "TF-IDF x label (1, 0)", "TracIn-WE", "TracIn-Last", "WE cosine"],
    "halves": 16,
    "seeds": 1,
    "tests": 5,
    "deletion_seeds": 1,
    "ks": [50],
}


def main() -> None:
    """Run what is asked for and not there yet, and write a table of JSON for each part and task."""
    options = _options()
    for name in options.tasks:
        task = in_float32(TASKS[name]()) if options.float32 else TASKS[name]()
        for part in options.parts:
            _PARTS[part](task, options)


def lds_part(task: Task, options: argparse.Namespace) -> None:
    """Fit to halves, and hold all methods' scores to that."""
    fit = _fit(task, options)
    for name, each in _scorers(task, options).items():
        kept_scores(options.folder, name, each, fit)
    scores = all_kept_scores(options.folder, task)
    if not BASELINES.keys() & scores.keys():
        raise SystemExit("Methods are held to the best baseline, and none is scored yet: run without --methods first.")
    halves = halves_of(task, options.folder, options.out / "halves", options.halves, range(options.seeds))
    table = lds_table(task, halves, scores, BASELINES, former=_read(options, f"lds-{task.name}"))
    _write(options, f"lds-{task.name}", table | {"accuracy": round(fit.accuracy(), 4)})


def deletion_part(task: Task, options: argparse.Namespace) -> None:
    """Fit without proponents, seed by seed: a run that is broken off has all methods with fewer seeds."""
    fit = _fit(task, options)
    tests = right_and_balanced(fit.probabilities(), task.test.labels, options.tests)
    known = contenders(task)
    scores = {name: kept_scores(options.folder, name, known[name], fit) for name in options.deletion_methods}
    deletion = Deletion(task, options.folder, tests)
    table = _read(options, f"deletion-{task.name}")
    if table and table["tests"] != tests:
        raise SystemExit(f"{options.out}/deletion-{task.name}.json is of other test examples: remove it to begin anew.")
    changes = changes_of(table) if table else []
    for seed in range(options.deletion_seeds):
        changes = with_seed(changes, deletion, scores, options.ks, seed)
        _write(options, f"deletion-{task.name}", deletion_table(deletion, changes, table))


def matters_part(task: Task, options: argparse.Namespace) -> None:
    """Ask whether proponents matter, of each number of them."""
    fit = _fit(task, options)
    tests = right_and_balanced(fit.probabilities(), task.test.labels, options.tests)
    for k in options.ks:
        table = matters_table(fit, options.folder, tests, k, options.deletion_seeds)
        _write(options, f"matters-{task.name}-{k}", table)


def mislabel_part(task: Task, options: argparse.Namespace) -> None:
    """Look for flipped labels, and for those of movie reviews that people disagreed on."""
    for share in (0.05, 0.2):
        changed, wrong = flipped(task, share)
        table = mislabel_table(changed, options.folder, wrong, f"{share:.0%} of the labels flipped")
        _write(options, f"mislabel-{changed.name}", table)
    if task.name.startswith("movies"):
        table = mislabel_table(task, options.folder, disagreed(task), "reviews whose ratings spread widely")
        _write(options, f"mislabel-{task.name}-spread", table)


def shortlist_part(task: Task, options: argparse.Namespace) -> None:
    """Look for the strongest proponents among the nearest training examples alone."""
    fit, known = _fit(task, options), contenders(task)
    scores, nearness = (
        {name: kept_scores(options.folder, name, known[name], fit) for name in names}
        for names in (options.deletion_methods, ("TF-IDF", "BM25", "representation cosine", "random"))
    )
    _write(options, f"shortlist-{task.name}", shortlist_table(task, scores, nearness))


_PARTS: Mapping[str, Callable[[Task, argparse.Namespace], None]] = {
    "lds": lds_part,
    "deletion": deletion_part,
    "mislabel": mislabel_part,
    "shortlist": shortlist_part,
    "matters": matters_part,
}


def _scorers(task: Task, options: argparse.Namespace) -> dict[str, Scorer]:
    """The methods whose scores are computed where they are missing; tables hold all that are there."""
    known = contenders(task, peers=options.peers)
    return known if options.methods is None else {name: known[name] for name in options.methods}


def _fit(task: Task, options: argparse.Namespace) -> Fitted:
    fit = fitted(task, options.folder)
    print(f"{task.title}: accuracy {fit.accuracy():.3f}", flush=True)  # noqa: T201
    return fit


def _read(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """A table that was written before; empty if there is none."""
    path = options.out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(options: argparse.Namespace, name: str, table: dict[str, Any]) -> None:
    """Write a table, and beside it the commands that made it."""
    options.out.mkdir(parents=True, exist_ok=True)
    commands = dict.fromkeys([*_read(options, name).get("commands", []), _command(sys.argv[1:])])
    content = {"commands": list(commands), "torch": torch.__version__, **table}
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out / name}.json", flush=True)  # noqa: T201


def _command(arguments: list[str]) -> str:
    """The command that was given, without the folders, which are of one machine.

    Example:
        >>> _command(["--folder", "/tmp/study", "--tasks", "sms-cnn"])
        'python -m benchmarks.evidence --tasks sms-cnn'
    """
    places = {"--folder", "--out"}
    kept = [each for before, each in zip(["", *arguments], arguments, strict=False) if not {before, each} & places]
    return " ".join(["python -m benchmarks.evidence", *map(shlex.quote, kept)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--parts", nargs="+", choices=list(_PARTS), default=["lds", "deletion", "mislabel", "shortlist"]
    )
    parser.add_argument(
        "--float32", action="store_true", help="fit without autocast: for CPUs that do not multiply bfloat16 themselves"
    )
    parser.add_argument("--quick", action="store_true", help="one task, few fits")
    parser.add_argument("--methods", nargs="*", help="whose scores are computed where they are missing; default: all")
    parser.add_argument(
        "--peers", action="store_true", help="other libraries and recipes too: make evidence installs them"
    )
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="with which each half is fitted")
    parser.add_argument("--tests", type=int, default=20, help="test examples of the case deletion")
    parser.add_argument("--deletion-seeds", type=int, default=5)
    parser.add_argument("--deletion-methods", nargs="+", default=["TracIn-WE", "TracIn-Last", "WE cosine"])
    parser.add_argument("--ks", nargs="+", type=int, default=[10, 20, 50, 100])
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="keeps fits, scores and retrainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/evidence/results"), help="of the tables")
    options = parser.parse_args()
    if options.quick:
        for name, value in _QUICK.items():
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
