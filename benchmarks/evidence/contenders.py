"""All that is compared, by name: the product's methods, baselines, and the peers whose libraries are installed."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.evidence.baselines.of_fit import BASELINES
from benchmarks.evidence.ours import Scorer, ours
from benchmarks.evidence.peers.of_fit import PEERS
from benchmarks.evidence.task import Task

#: What takes more than a minute or two on a core: left out of a quick run.
SLOW = (
    "UnTrac-Inv, lr 5e-5",
    "UnTrac-Inv, lr 1e-3",
    "Captum TracInCP, embedding",
    "dattri TRAK, all parameters",
    "dattri TRAK, all checkpoints",
    "dattri TracIn, projected",
    "kronfluence EK-FAC",
)


def contenders(task: Task, *, quick: bool = False) -> dict[str, Scorer]:
    """The functions from a fit to scores, (n_test, n_train), by name.

    Args:
        task: whose layers the product's methods are of.
        quick: leave out what is slow.
    """
    missing = tuple(name for name in ("captum", "dattri", "kronfluence") if find_spec(name) is None)
    if missing:
        print(f"Not compared, since they are not installed: {', '.join(missing)}.", flush=True)  # noqa: T201
    return {
        name: scorer
        for name, scorer in {**ours(task), **BASELINES, **PEERS}.items()
        if not (quick and name in SLOW) and not name.lower().startswith(missing)
    }
