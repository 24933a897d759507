"""Verification of every file of a trace by its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lightning_tracin.storage.files import check_file, read_json
from lightning_tracin.storage.own_files import HEADER, own_temporary
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
    yield trace.path / HEADER, _problem(trace.path / HEADER, partial(read_json, trace.path / HEADER))
    for path in own_temporary(trace.path):
        yield path, f"{path} was left behind by a fit that was broken off (or is still running); it is never read."
    folders = [path for path in sorted(trace.path.glob("checkpoints/step-*")) if path.is_dir() and not path.suffix]
    all_read = True
    for folder in folders:
        file = folder / "checkpoint.json"
        problem = _problem(file, partial(trace.read_checkpoint, file))
        all_read = all_read and problem is None
        yield file, problem
        for name, checksum in {} if problem else trace.read_checkpoint(file).checksums.items():
            yield folder / name, _problem(folder / name, partial(check_file, folder / name, checksum))
    if all_read:  # or the file is named above
        try:
            trace.check_whole(trace.checkpoints)
        except FileNotFoundError as error:
            yield trace.path / "checkpoints", str(error)
    stored = [
        folder / name
        for folder in folders
        for name in (*(site.key for site in trace.sites), "texts")
        if (folder / name).exists()
    ]
    if stored:  # texts and vocabulary are stored with the first gradients
        path = trace.path / "vocabulary.json"
        yield path, _problem(path, partial(read_json, path, ["words"]))
        if not any(folder.name == "texts" for folder in stored):
            stored.append(trace.path / "texts")
    for folder in stored:
        yield from _verify_shards(trace, folder)


def _verify_shards(trace: Trace, folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Verify a folder of shards; see :func:`verify`."""
    path = folder / "index.json"
    problem = _problem(path, lambda: trace.check_counts(Shards.open(folder)))
    yield path, problem
    if problem is None:
        for file, checksum in Shards.open(folder).files:
            yield file, _problem(file, partial(check_file, file, checksum))


def _problem(path: Path, read: Callable[[], object]) -> str | None:
    """The problem with a file in words, from the error that reading it raises; None without an error."""
    try:
        read()
    except FileNotFoundError:
        return f"{path} is missing."
    except (OSError, ValueError) as error:
        return str(error)
    return None
