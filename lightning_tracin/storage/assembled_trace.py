"""A trace of checkpoints that are there already: written whole, or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage import schemas
from lightning_tracin.storage.checkpoint import DRAWN, Checkpoint
from lightning_tracin.storage.files import atomic_folder, write_tensors
from lightning_tracin.storage.own_files import HEADER, mark_removed, remove_temporary, remove_trace, require_free
from lightning_tracin.storage.recorded_checkpoint import write_weights
from lightning_tracin.storage.schemas import FORMAT, FORMAT_VERSION, CheckpointFile, Step, TraceFile, TraceHeader
from lightning_tracin.storage.second_moments import SecondMoments, moments_file
from lightning_tracin.storage.trace import Trace


@dataclass(frozen=True)
class KnownCheckpoint:
    """What is written of a checkpoint.

    Attributes:
        step: optimizer steps of the run up to it.
        epoch: the epoch that it was taken in.
        steps: the optimizer steps since the checkpoint before, or one that stands for them, with their mean rates.
        groups: the parameter names of each group of each optimizer.
        weights: the module's state dict.
        frozen: names of the weights that no gradient moves.
        moments: Adam's second moments, at the sites where they are known.
        drawn: (n_train,) bool, the examples that were trained on since the checkpoint before; None if all were.
        repeats: how many steps each of ``steps`` stands for in another trace; none where that is one.
    """

    step: int
    epoch: int
    steps: list[Step]
    groups: list[list[list[str]]]
    weights: Mapping[str, Any]
    frozen: Set[str]
    moments: Mapping[Site, SecondMoments]
    drawn: Tensor | None
    repeats: list[int]


def assembled_trace(path: Path, header: TraceHeader, checkpoints: Iterable[KnownCheckpoint]) -> Trace:
    """Write a trace of some checkpoints, without gradients; its folder must be locked.

    Args:
        path: the folder; a trace that is already there is removed, and nothing else.
        header: the content of ``trace.json``.
        checkpoints: in the order of the run; each is asked for when the one before is written.

    Raises:
        FileExistsError: if files of others, or links, are in the way.
        OSError: if a file cannot be written. Nothing of the trace is left then, whatever the error.
    """
    require_free(path)
    remove_trace(path)
    path.mkdir(parents=True, exist_ok=True)
    mark_removed(path)  # until all is there: what is broken off is no trace
    try:
        previous: Checkpoint | None = None
        for each in checkpoints:
            previous = _written(path, header, each, previous)
        known = {"format": FORMAT, "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        schemas.write(path / HEADER, TraceFile(**known, **msgspec.structs.asdict(header)))  # type: ignore[arg-type]
    except BaseException:
        remove_temporary(path)
        remove_trace(path)
        raise
    remove_temporary(path)  # of one that was killed here
    return Trace(path)


def _written(path: Path, header: TraceHeader, known: KnownCheckpoint, previous: Checkpoint | None) -> Checkpoint:
    """Write one checkpoint; it may share frozen weights with the one before."""
    place = path / "checkpoints" / f"step-{known.step:09d}"
    with atomic_folder(place) as folder:
        checksums = write_weights(
            folder, path, known.weights, known.frozen, {} if previous is None else previous.shared
        )
        for site, moments in known.moments.items():
            checksums[moments_file(site)] = moments.write(folder / moments_file(site))
        if known.drawn is not None:
            checksums[DRAWN] = write_tensors(folder / DRAWN, {"drawn": known.drawn})
        content = CheckpointFile(
            id=uuid.uuid4().hex,
            step=known.step,
            epoch=known.epoch,
            previous=None if previous is None else previous.id,
            steps=known.steps,
            repeats=known.repeats,
            groups=known.groups,
            checksums=checksums,
        )
        schemas.write(folder / "checkpoint.json", content)
    return Checkpoint.of(place, header, content)
