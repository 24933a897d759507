"""Safetensors and JSON files that are written atomically, and verified by checksum when they are read.

The checksum of a safetensors file is kept by whoever writes it; a JSON file holds that of its own content. A checksum
shows what has changed, not who wrote it: ``schemas`` and ``layouts`` say what each kind of file may hold, and here
only regular files of a limited size are read, and none outside of the trace.

A file or folder is written under a name that ends in ``.partial``, and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_tracin.gradients.printable import printable
from lightning_tracin.parallel.processes import ALONE, Processes, wait_until_visible

PARTIAL = ".partial"

#: The key, of a JSON file's object, of the checksum of everything else in it.
CHECKSUM = "checksum"

_REPAIR = (
    "Restore the file from a copy, or fit again; if it holds gradients, it is enough to remove its folder: the next "
    "influence with the training set at hand computes them again."
)

_SMALLER = {
    "checkpoint.json": "It has the layers that did not move in each step since the checkpoint before, once for all "
    "steps where they are the same: take checkpoints more often (every_n_train_steps of TracInCallback), or record "
    "fewer layers.",
    "vocabulary.json": "Let influence_words name fewer tokens.",
}  # what to do where a file has become too large

# Parsed, JSON takes some 100 bytes for each value, and 400 for each key: with these limits, less than a gigabyte. They
# allow for a million words; steps between two checkpoints are summed up long before.
_JSON_BYTES, _JSON_VALUES, _VALUES_OF_KEY = 64 * 2**20, 4_000_000, 3

# Of the header of a safetensors file, which may hold the words of a saved result, and its braces: one for each tensor.
_HEADER_BYTES, _HEADER_BRACES = 32 * 2**20, 60_000


class Layout(Protocol):
    """What a kind of safetensors file must hold; hashable, so that it is verified once for each file."""

    def __hash__(self) -> int: ...

    def check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Check the tensors of a file, and its metadata.

        Raises:
            ValueError: if they are others; the message says what is wrong, and not where.
        """


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, alone: bool = False
) -> str:
    """Write a safetensors file atomically, and return its checksum.

    Args:
        path: the file.
        tensors: by name.
        metadata: texts by name.
        alone: whether who may read it is what the process says of new files (umask); of those of a trace, whose folder
            several people may share, it is what the folder says.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_file(path) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        mode = (partial if alone else path.parent).stat().st_mode
        try:
            save_file(contiguous, partial, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}. What was stored before is complete.") from error
        # safetensors creates files that only their owner can read; who writes this one, may, whatever the folder says
        partial.chmod(mode & 0o666 | 0o600)
        return _hash_of_file(partial)


def read_tensors(
    path: Path, checksum: str, layout: Layout | None = None, *, within: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata.

    The checksum and the layout are verified the first time that a process reads the file.

    Args:
        path: the file.
        checksum: of its bytes.
        layout: what it must hold; None for a file that this process wrote itself.
        within: the folder that no link may lead out of.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, lies outside, its checksum differs, or it does not hold what it must.
    """
    status = status_of(path, within)
    _check(path, status.st_size, status.st_mtime_ns, checksum)
    if layout is not None:
        _check_layout(path, status.st_size, status.st_mtime_ns, checksum, layout)
    return open_tensors(path)


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata; neither is verified.

    Raises:
        ValueError: if it is no safetensors file, its header is too large, or torch does not know a type in it.
    """
    try:
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("it does not begin as a safetensors file does")
            if size > _HEADER_BYTES or opened.read(size).count(b"{") > _HEADER_BRACES:
                raise ValueError(f"its header has {size} bytes, or more than {_HEADER_BRACES} tensors, and is not read")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {printable(str(error))}. {_REPAIR}") from error


def size_of(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return status_of(path).st_size


def status_of(path: Path, within: Path | None = None) -> os.stat_result:
    """The status of a regular file; anything else, such as a device, might never end.

    Args:
        path: the file.
        within: the folder that no link may lead out of.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, or lies outside.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing. {_REPAIR}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is damaged: it is no file, but a folder, a pipe or a device. {_REPAIR}")
    if within is not None:
        require_within(path, within)
    return status


def require_within(path: Path, folder: Path) -> None:
    """Check that no link leads from a path out of the folder that it is in.

    Raises:
        ValueError: if one does.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{path} leads to {real}, out of {folder}, by a link, which is not followed. Put what is meant into its "
            "place."
        )


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write an object to a JSON file atomically, with the checksum of its content as its last key.

    Raises:
        ValueError: if it is too large to be read again.
    """
    plain = json.loads(json.dumps(content))  # as it will be read: keys are strings, tuples are lists
    plain.pop(CHECKSUM, None)  # of what it was read from
    plain[CHECKSUM] = _hash_of_json(plain)
    encoded = (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode()
    try:
        require_small(encoded)
    except ValueError as error:
        raise ValueError(f"{path} was not written: {error}. {_SMALLER.get(path.name, '')}".strip()) from error
    with atomic_file(path) as partial:
        partial.write_bytes(encoded)


def read_json(path: Path, *, within: Path | None = None) -> dict[str, Any]:
    """The object that :func:`write_json` wrote to a file, without its checksum, which is verified at each reading.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, is too large, is not valid JSON, or its checksum differs.
    """
    content = json_bytes(path, within)
    with damage_named(path):
        return parsed_json(content)


def json_bytes(path: Path, within: Path | None = None) -> bytes:
    """The bytes of a JSON file, unless they would take too much memory when they are parsed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, or is too large.
    """
    size = status_of(path, within).st_size
    content = path.read_bytes() if size <= _JSON_BYTES else b""
    with damage_named(path):
        require_small(content, size)
    return content


def require_small(content: bytes, size: int | None = None) -> None:
    """Check that JSON does not take too much memory when it is parsed.

    Raises:
        ValueError: if it would.
    """
    size = len(content) if size is None else size
    n_values = sum(map(content.count, (b",", b"[", b"{"))) + _VALUES_OF_KEY * content.count(b":")
    if size > _JSON_BYTES or n_values > _JSON_VALUES:
        raise ValueError(
            f"{size} bytes of JSON with some {n_values} values are too large: at most {_JSON_BYTES} bytes and "
            f"{_JSON_VALUES} values are read"
        )


def parsed_json(content: bytes) -> dict[str, Any]:
    """An object from JSON, without its checksum, which is verified.

    Raises:
        ValueError: as :func:`object_from_json`, or if its checksum differs.
        RecursionError: if it is nested too deeply.
    """
    parsed = object_from_json(content)
    if CHECKSUM not in parsed:
        raise ValueError(f"there is no {CHECKSUM} in it")
    written = parsed.pop(CHECKSUM)
    actual = _hash_of_json(parsed)
    if actual != written:
        raise ValueError(f"its content has the checksum {actual}, but {written} was written")
    return parsed


def object_from_json(content: bytes) -> dict[str, Any]:
    """An object from JSON.

    Raises:
        ValueError: if it is no object, or has a key twice or a number that is not finite.
        RecursionError: if it is nested too deeply.
    """
    parsed = json.loads(content.decode(), object_pairs_hook=_with_distinct_keys, parse_constant=_refused)
    if not isinstance(parsed, dict):
        raise ValueError("it holds no object")
    return parsed


@contextmanager
def damage_named(path: Path, remedy: str = "Restore the file from a copy, or fit again.") -> Iterator[None]:
    """Turn what is found wrong with a file's content into an error that names the file and says what to do.

    Raises:
        ValueError: if something is.
    """
    try:
        yield
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {printable(str(error))}. {remedy}") from error


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def hash_of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A checksum of tensors (their names, types, shapes and bytes, whatever their order), and of a text with them."""
    digest = xxhash.xxh3_128(json.dumps(text).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def _check(path: Path, size: int, modified: int, checksum: str) -> None:
    """Verify a file's checksum; the result is cached for a size and modification time."""
    actual = _hash_of_file(path)
    if actual != checksum:
        raise ValueError(
            f"{path} is damaged: its {size} bytes have the checksum {actual}, but {checksum} was written. {_REPAIR}"
        )


@cache
def _check_layout(path: Path, size: int, modified: int, checksum: str, layout: Layout) -> None:
    """Verify what a file holds; the result is cached like that of :func:`_check`."""
    tensors, metadata = open_tensors(path)
    with damage_named(path, _REPAIR):
        layout.check(tensors, metadata)


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
        with partial.open("r+b") as file:  # Windows refuses to synchronise a file that is open for reading alone
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file that was asked for, which appears whole or not at all.

    What is no regular file, such as /dev/stdout, is written to directly; of a link, what it leads to is replaced.
    Folders that are missing are made.
    """
    if path.exists() and not path.is_file():
        yield path
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(os.path.realpath(path))) as partial:
            yield partial


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
