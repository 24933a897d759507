"""Safetensors and JSON files that are written atomically, and verified by checksum when they are read.

The checksum of a safetensors file is kept by whoever writes it; a JSON file holds that of its own content.

A file or folder is written under a name that ends in ``.partial``, and renamed when it is complete.
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

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_tracin.parallel.processes import ALONE, Processes, wait_until_visible

PARTIAL = ".partial"

#: The key, of a JSON file's object, of the checksum of everything else in it.
CHECKSUM = "checksum"

_REPAIR = (
    "Restore the file from a copy, or fit again; if it holds gradients, it is enough to remove its folder: the next "
    "influence with the training set at hand computes them again."
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically, and return its checksum.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_file(path) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, partial, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}. What was stored before is complete.") from error
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        return _hash_of_file(partial)


def read_tensors(path: Path, checksum: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata.

    The checksum is verified the first time that a process reads the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its checksum differs.
    """
    check_file(path, checksum)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def check_file(path: Path, checksum: str) -> None:
    """Verify a file's checksum, unless this process has done so since the file was last modified.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its checksum differs.
    """
    status = _status(path)
    _check(path, status.st_size, status.st_mtime_ns, checksum)


def size_of(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return _status(path).st_size


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write an object to a JSON file atomically, with the checksum of its content as its last key."""
    plain = json.loads(json.dumps(content))  # as it will be read: keys are strings, tuples are lists
    plain.pop(CHECKSUM, None)  # of what it was read from
    plain[CHECKSUM] = _hash_of_json(plain)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, keys: Sequence[str] = (), *, older: bool = False) -> dict[str, Any]:
    """The object that :func:`write_json` wrote to a file, without its checksum, which is verified at each reading.

    Args:
        path: the file.
        keys: keys that the object must have.
        older: whether the file may lack the checksum, as those of older versions do.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not valid JSON, its checksum differs, or it lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        missing = [key for key in (*([] if older else [CHECKSUM]), *keys) if key not in content]
        if missing:
            raise ValueError(f"there is no {' and no '.join(missing)} in it")
        if CHECKSUM in content:
            written = content.pop(CHECKSUM)
            actual = _hash_of_json(content)
            if actual != written:
                raise ValueError(f"its content has the checksum {actual}, but {written} was written")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Restore the file from a copy, or fit again.") from error
    return content


def hash_of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A checksum of tensors (their names, types, shapes and bytes, whatever their order), and of a text with them."""
    digest = xxhash.xxh3_128(json.dumps(text).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing. {_REPAIR}") from error


@cache
def _check(path: Path, size: int, modified: int, checksum: str) -> None:
    """Verify a file's checksum; the result is cached for a size and modification time."""
    actual = _hash_of_file(path)
    if actual != checksum:
        raise ValueError(
            f"{path} is damaged: its {size} bytes have the checksum {actual}, but {checksum} was written. {_REPAIR}"
        )


def _hash_of_json(content: Mapping[str, Any]) -> str:
    """The checksum of an object, however it is laid out in a file."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _hash_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**20):  # a memory-mapped shard would count towards this process's memory
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which is renamed to ``path`` on success and removed on an error.

    Its name cannot be foreseen and the file is created anew, so that a link which somebody has put into the folder is
    never followed.
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
    """Yield a temporary folder, which is renamed when all processes have filled it and removed if one of them fails.

    Args:
        folder: the folder's final path.
        processes: the processes that write into it; every one of them must enter the context.

    Raises:
        FileNotFoundError: if a process does not see the folder that the first one renamed.
    """
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
