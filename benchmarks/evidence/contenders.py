"""All that is compared, by name: the product's methods, baselines, and peers."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.evidence.baselines.of_fit import BASELINES
from benchmarks.evidence.ours import Scorer, ours
from benchmarks.evidence.peers.of_fit import PEERS
from benchmarks.evidence.task import Task

LIBRARIES = ("captum", "dattri", "kronfluence")


def contenders(task: Task, *, peers: bool = False) -> dict[str, Scorer]:
    """The functions from a fit to scores, (n_test, n_train), by name.

    Args:
        task: whose layers the product's methods are of.
        peers: also other libraries and other papers' recipes, some of which take minutes.

    Raises:
        SystemExit: if a peer's library is not installed.
    """
    if not peers:
        return {**BASELINES, **ours(task)}
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise SystemExit(f"--peers needs {', '.join(missing)}: run `make evidence`, then PYTHONPATH=.venv/peers.")
    return {**BASELINES, **ours(task), **PEERS}
