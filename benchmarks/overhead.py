"""A fit with each way of caching against the same fit without the callback: MiniLM-L6, 64 tokens, batches of 32."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Literal

from benchmarks.measure import Row, in_turns, median_ratio, parser, report
from benchmarks.workload import Texts, quiet
from lightning_tracin import TracInCallback

Cache = Literal["checkpoint", "training", "on_demand"]
CACHES: tuple[Cache, ...] = ("on_demand", "training", "checkpoint")


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=640)
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    options = arguments.parse_args()
    texts = Texts(options.examples, 0)

    def fit(cache: Cache | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [] if cache is None else [TracInCallback(folder, cache=cache)]
            trainer = quiet(max_epochs=options.epochs, callbacks=callbacks)
            trainer.fit(texts.module(), texts.loader("train", shuffle=True))

    contenders: dict[str, Callable[[], object]] = {"without": partial(fit, None)}
    contenders |= {cache: partial(fit, cache) for cache in options.caches}
    seconds = in_turns(contenders, options.repeats)
    limits = {"training": "<= 1.05"}
    rows = [
        Row(
            f'fit with cache="{cache}" / fit without the callback',
            median_ratio(seconds[cache], seconds["without"]),
            limit=limits.get(cache, ""),
            details={"seconds": seconds[cache]},
        )
        for cache in options.caches
    ]
    rows.append(Row("fit without the callback", statistics.median(seconds["without"]), "s"))
    title = f"{options.examples} articles, {options.epochs} epoch(s), a checkpoint after each"
    report("overhead", title, rows, options.out)


if __name__ == "__main__":
    main()
