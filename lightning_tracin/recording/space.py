"""What a fit will write, compared with what the disk holds, and what would take less."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.filesize import decimal

from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.gradients.sites import Site
from lightning_tracin.recording.cost import Cost
from lightning_tracin.recording.plan import Cache, RecordingPlan
from lightning_tracin.storage.runs import max_run_bytes
from lightning_tracin.storage.sizes import TraceSize


def require_space(trainer: pl.Trainer, plan: RecordingPlan, path: Path, cost: Cost, training_set: TrainingSet) -> None:
    """Check that the disk has room for what a fit will write: for the next checkpoint, and with a warning for all.

    Raises:
        OSError: if it has not enough for one; the message says how much is needed, and what would fit.
    """
    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    sorts = plan.cache == "checkpoint" and training_set.batches is not None  # passes, on disk
    disk = _Disk(free, cost, sorts, trainer.world_size)
    checkpoints = cost.size.checkpoints or 1
    if disk.needed(cost.size, checkpoints, plan.cache) <= free:
        return
    fits_one = disk.needed(cost.size, 1, plan.cache) <= free
    number = checkpoints if fits_one else 1
    need = (
        f"The trace in {path} needs about {_size(disk.needed(cost.size, number, plan.cache))} for "
        f"{number} checkpoint{'s' * (number > 1)} of {len(training_set)} training examples, but only "
        f"{_size(free)} are free"
    )
    less = _advice(plan, disk, number)
    if not fits_one:
        raise OSError(errno.ENOSPC, f"{need}; nothing was written. {less}")
    goes_on = "the recording" if plan.on_error == "warn" else "the fit"
    rank_zero_warn(f"{need}. If the disk fills up, {goes_on} ends there, and what is stored stays complete. {less}")


@dataclass(frozen=True)
class _Disk:
    """A disk, and what lies on it for a while beside a trace.

    Attributes:
        free: bytes that are free.
        cost: of the fit.
        sorts: whether a pass is sorted on disk.
        n_processes: how many write.
    """

    free: int
    cost: Cost
    sorts: bool
    n_processes: int

    def needed(self, size: TraceSize, number: int, cache: Cache) -> float:
        """Bytes of a number of checkpoints."""
        if cache == "on_demand":
            return replace(size, gradients={}, texts=0, components=0).of(number)
        beside = 0.0
        if cache == "training":
            expected = self.cost.expected
            passes = math.ceil(expected.epochs) * max(1.0, expected.draws)
            beside = max_run_bytes(size.all_gradients, passes, self.n_processes)
        elif self.sorts:
            beside = size.all_gradients
        return size.of(number) + beside


def _advice(plan: RecordingPlan, disk: _Disk, number: int) -> str:
    """What makes a fit fit on the disk, each with what it needs."""
    found = {name: disk.needed(size, number, cache) for name, size, cache in _savers(plan, disk.cost)}
    if number > 1:
        found |= _rarer(plan, disk, number)
    fitting = [f"{name} ({_size(needed)})" for name, needed in found.items() if needed <= disk.free]
    if fitting:
        return f"Each of these fits: {'; '.join(fitting)}."
    name, smallest = _smallest(plan, disk.cost)
    needed = disk.needed(smallest, 1, plan.cache)
    if needed <= disk.free:
        return f"This fits, for one checkpoint: {name} ({_size(needed)})."
    return f"Not even {name} fits ({_size(needed)} for one checkpoint). Free some space, or pass a dirpath elsewhere."


def _savers(plan: RecordingPlan, cost: Cost) -> Iterator[tuple[str, TraceSize, Cache]]:
    """What takes less space: arguments of the callback, the size with them, and ``cache``."""
    options, sites = plan.options, cost.sites
    narrow, named = replace(options, dtype="float16"), "" if options.dtype != "float32" else ', dtype="float16"'
    if named:
        yield named[2:], cost.sized(narrow, sites), plan.cache
    if plan.keep_weights and plan.cache != "on_demand" and not plan.log_examples:
        yield "keep_weights=False", replace(cost.size, weights=0, frozen=0), plan.cache
    for methods, chosen in _fewer_methods(plan, sites):
        yield methods, cost.sized(options, chosen), plan.cache
    plain = cost.sized(narrow, sites)
    for name, fewer in (("top_words=10", {"top_words": 10}), ("projection=(32, 128)", {"projection": (32, 128)})):
        if all(getattr(options, option) is None for option in fewer):
            size = cost.sized(replace(narrow, **fewer), sites)
            if size.checkpoint < plain.checkpoint:
                yield f"{name}{named}", size, plan.cache
    if plan.cache != "on_demand" and plan.keep_weights and not plan.log_examples:
        yield 'cache="on_demand", until influence is asked for', cost.size, "on_demand"


def _fewer_methods(plan: RecordingPlan, sites: Sequence[Site]) -> Iterator[tuple[str, list[Site]]]:
    """Each of several methods alone, as an argument, with its sites."""
    for method in plan.methods if len(plan.methods) > 1 else ():
        chosen = [site for site in sites if site.name == method or fnmatchcase(site.name, method)]
        if chosen:
            yield f"methods={(method,)!r}".replace("'", '"'), chosen


def _rarer(plan: RecordingPlan, disk: _Disk, number: int) -> Mapping[str, float]:
    """The fewest epochs, or steps, between checkpoints with which so many fit that the disk can hold."""
    name, every = ("every_n_epochs", plan.every_n_epochs)
    if plan.every_n_train_steps is not None:
        name, every = "every_n_train_steps", plan.every_n_train_steps
    fewer = next((n for n in range(number - 1, 0, -1) if disk.needed(disk.cost.size, n, plan.cache) <= disk.free), None)
    if fewer is None:
        return {}
    return {f"{name}={every * -(-number // fewer)}": disk.needed(disk.cost.size, fewer, plan.cache)}


def _smallest(plan: RecordingPlan, cost: Cost) -> tuple[str, TraceSize]:
    """All savers together."""
    options = replace(plan.options, dtype="int8", top_words=plan.options.top_words or 10)
    alone = {methods: cost.sized(options, chosen) for methods, chosen in _fewer_methods(plan, cost.sites)}
    sizes = alone or {"": cost.sized(options, cost.sites)}
    methods = min(sizes, key=lambda each: sizes[each].checkpoint)
    smallest = sizes[methods]
    words = [site for site in cost.sites if site.has_words and site.name in smallest.gradients]
    named = [methods, 'dtype="int8"', f"top_words={options.top_words}" if words else ""]
    if plan.keep_weights and plan.cache != "on_demand" and not plan.log_examples:
        smallest = replace(smallest, weights=0, frozen=0)
        named.append("keep_weights=False")
    return ", ".join(filter(None, named)), smallest


def _size(n_bytes: float) -> str:
    return decimal(int(n_bytes))
