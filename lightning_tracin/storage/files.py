"""Files and folders that appear whole or not at all, and are checked when they are read: safetensors and JSON.

What is being written bears a name that ends in ``.partial``, and takes its own when it is on disk.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_tracin.parallel.processes import ALONE, Processes, wait_until_visible

PARTIAL = ".partial"

_REPAIR = (
    "Restore the file from a copy, or fit again; if it holds gradients, it is enough to remove its folder: the next "
    "influence with the training set at hand computes them again."
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file that appears whole or not at all, and return its checksum."""
    with atomic_file(path) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, partial, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}. What was stored before is complete.") from error
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it
        return _hash_of_file(partial)


def read_tensors(path: Path, checksum: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata.

    A file is checked the first time that a process reads it.

    Raises:
        ValueError: if the file is not as it was written.
    """
    check_file(path, checksum)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def check_file(path: Path, checksum: str) -> None:
    """Compare a file with its checksum, unless this process has done so since the file was written.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not as it was written.
    """
    status = _status(path)
    _check(path, status.st_size, status.st_mtime_ns, checksum)


def size_of(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return _status(path).st_size


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, keys: Sequence[str] = ()) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        keys: what the object in it must have.

    Raises:
        ValueError: if it is no JSON, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
        if missing:
            raise ValueError(f"there is no {' and no '.join(missing)} in it")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Restore the file from a copy, or fit again.") from error
    return content


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing. {_REPAIR}") from error


@cache
def _check(path: Path, size: int, modified: int, checksum: str) -> None:
    """Compare a file with its checksum, once for each state that it is found in."""
    found = _hash_of_file(path)
    if found != checksum:
        raise ValueError(
            f"{path} is damaged: its {size} bytes have the checksum {found}, but {checksum} was written. {_REPAIR}"
        )


def _hash_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(2**20):  # mapped as a whole, a shard would count as memory of this process
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes its name when it is on disk and vanishes when it cannot be written.

    Until then its name is one that nobody can have foreseen, and it is made anew: a link that somebody has put into the
    folder is never followed.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path, processes: Processes = ALONE) -> Iterator[Path]:
    """A folder to fill, which takes its name when all processes are done and vanishes when one of them fails."""
    partial = folder.with_name(folder.name + PARTIAL)
    with processes.synchronized():
        if processes.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        with processes.synchronized():
            yield partial
        with processes.synchronized():
            if processes.first:
                partial.replace(folder)
        with processes.synchronized():
            wait_until_visible(folder.exists, f"The first process has written {folder}")
    except BaseException:
        if processes.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
