"""Verification of every file of a trace by its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lightning_tracin.storage.checkpoint import WEIGHTS, Checkpoint
from lightning_tracin.storage.components import COMPONENTS
from lightning_tracin.storage.files import read_tensors
from lightning_tracin.storage.own_files import HEADER, own_temporary
from lightning_tracin.storage.schemas import VocabularyFile, read
from lightning_tracin.storage.shards import Shards
from lightning_tracin.storage.trace import Trace


def verify(trace: Trace) -> Iterator[tuple[Path, str | None]]:
    """Verify every file of a trace.

    Safetensors files are compared with the checksums that JSON files hold of them, and each JSON file with the one that
    it holds of itself. A file that no other file names cannot be missed, such as a last checkpoint whose whole folder
    was deleted.

    Yields:
        The path of each file, and its problem in words, or None. A temporary file or folder of an interrupted write is
        reported as a problem, though nothing reads it.
    """
    yield trace.path / HEADER, _problem(trace.path / HEADER, lambda: Trace(trace.path))
    for path in own_temporary(trace.path):
        yield path, f"{path} was left behind by a fit that was broken off (or is still running); it is never read."
    folders = [path for path in sorted(trace.path.glob("checkpoints/step-*")) if path.is_dir() and not path.suffix]
    yield from _verify_checkpoints(trace, folders)
    stored = {
        folder / name: kind
        for folder in folders
        for name, kind in (*((site.key, site.shape) for site in trace.sites), ("texts", "texts"))
        if (folder / name).exists()
    }
    if stored:  # texts and vocabulary are stored with the first gradients
        path = trace.path / "vocabulary.json"
        yield path, _problem(path, partial(read, path, VocabularyFile, within=trace.path))
        if (trace.path / "texts").exists() or not any(folder.name == "texts" for folder in stored):
            stored[trace.path / "texts"] = "texts"
    for folder, kind in stored.items():
        yield from _verify_shards(trace, folder, kind)


def _verify_checkpoints(trace: Trace, folders: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Verify all of the checkpoints but the gradients; see :func:`verify`."""
    all_read = True
    files: dict[Path, tuple[Checkpoint, str]] = {}  # checkpoints share those of frozen weights, which come first
    for folder in folders:
        file = folder / "checkpoint.json"
        problem = _problem(file, partial(trace.read_checkpoint, file))
        all_read = all_read and problem is None
        yield file, problem
        if problem is None:
            checkpoint = trace.read_checkpoint(file)
            for name in checkpoint.checksums:
                files[checkpoint.file(name)] = (checkpoint, name)
    broken: set[Path] = set()
    for path, (checkpoint, name) in sorted(files.items(), key=lambda each: each[0].parent != trace.path):
        check: Callable[[], object] = partial(checkpoint.check_file, name)
        if name == WEIGHTS and broken & {checkpoint.file(each) for each in checkpoint.shared}:  # which it is read with
            check = partial(read_tensors, path, checkpoint.checksums[name], within=trace.path)
        problem = _problem(path, check)
        yield path, problem
        broken |= {path} if problem else set()
    if all_read:  # or the file is named above
        try:
            trace.check_whole(trace.checkpoints)
        except FileNotFoundError as error:
            yield trace.path / "checkpoints", str(error)


def _verify_shards(trace: Trace, folder: Path, kind: str) -> Iterator[tuple[Path, str | None]]:
    """Verify a folder of shards; see :func:`verify`."""
    path = folder / "index.json"
    problem = _problem(path, lambda: Shards.open(folder, within=trace.path).checked(kind, trace.header))
    yield path, problem
    if problem is None:
        shards = Shards.open(folder, within=trace.path)
        held = [shard for shard in range(len(shards)) if shards.holds(shard)]
        for shard, (file, _) in zip(held, shards.files, strict=True):
            yield file, _problem(file, partial(shards.read, shard))
        site = next((site for site in trace.sites if site.key == folder.name and site.rank is not None), None)
        if site is not None:
            yield folder / COMPONENTS, _problem(folder / COMPONENTS, partial(shards.factors, site))


def _problem(path: Path, read: Callable[[], object]) -> str | None:
    """The problem with a file in words, from the error that reading it raises; None without an error."""
    try:
        read()
    except FileNotFoundError:
        return f"{path} is missing."
    except (OSError, ValueError) as error:
        return str(error)
    return None
