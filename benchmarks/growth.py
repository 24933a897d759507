"""Growth with the training set: a fit, the gradients that it stores, and a top-k query, over more and more examples.

The texts are synthetic, made as they are read, with words as frequent as in BBC News; the model is a bag of words, so
that what grows is lightning_tracin's. Each size has a process of its own, whose peak memory is read from the system.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.measure import Row, in_own_process, parser, peak_megabytes, report
from benchmarks.workload import Bag, Synthetic, bytes_below, quiet
from lightning_tracin import TracInCallback

_TESTS = 16


def one_size(n_examples: int, hidden: int, cache: Any) -> dict[str, float]:
    """Fit, cache and query; seconds, megabytes on disk, and the peak of this process's memory."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet(max_epochs=1, callbacks=[TracInCallback(Path(folder) / "trace", cache=cache)])
        began = time.perf_counter()
        trainer.fit(Bag(hidden), DataLoader(Synthetic(n_examples), batch_size=256, shuffle=True))
        fitted = time.perf_counter()
        trainer.influence(DataLoader(Synthetic(_TESTS, seed=1), batch_size=_TESTS), k=10)
        return {
            "fit": fitted - began,
            "query": time.perf_counter() - fitted,
            "disk": bytes_below(Path(folder)) / 1e6,
            "memory": peak_megabytes(),
        }


def main() -> None:
    """Measure and report; with ``--one``, only one size, as JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000, 80_000, 320_000])
    arguments.add_argument("--hidden", type=int, default=32)
    arguments.add_argument("--cache", choices=("checkpoint", "training"), default="checkpoint")
    arguments.add_argument("--one", type=int, help="only this size, in this process, printed as JSON")
    options = arguments.parse_args()
    if options.one is not None:
        sys.stdout.write("\n" + json.dumps(one_size(options.one, options.hidden, options.cache)) + "\n")
        return
    rows = []
    found = {}
    for size in options.sizes:
        fixed = ["--hidden", str(options.hidden), "--cache", options.cache]
        found[size] = in_own_process("benchmarks.growth", "--one", str(size), *fixed)
        rows.append(Row(f"{size:,} examples: fit and cache", found[size]["fit"], "s", details=found[size]))
        rows.append(Row(f"{size:,} examples: query of {_TESTS}, k=10", found[size]["query"], "s"))
        rows.append(Row(f"{size:,} examples: on disk", found[size]["disk"], "MB"))
        rows.append(Row(f"{size:,} examples: peak memory", found[size]["memory"], "MB"))
    first, last = 20_000 if 20_000 in found else options.sizes[0], options.sizes[-1]
    memory = found[last]["memory"] / found[first]["memory"]
    rows.append(Row(f"peak memory, {last:,} / {first:,} examples", memory, limit="<= 1.1"))
    title = f'Growth: hidden size {options.hidden}, 64 tokens, cache="{options.cache}"'
    report(f"growth-{options.cache}", title, rows, options.out)


if __name__ == "__main__":
    main()
