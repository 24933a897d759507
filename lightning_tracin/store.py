"""Gradients and texts on disk: shards of safetensors, each with a fixed number of examples, memory-mapped when read.

A folder holds ``00000.safetensors``, ``00001.safetensors``, ... and ``index.json``, which is written last and knows the
checksum of each. Shard ``j`` holds examples ``j * shard_examples`` up to ``(j + 1) * shard_examples``. Word gradients
are sorted by token, so that a query touches only the rows of the words that it asks for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_tracin.gradients import Block, Dtype, Gradients, LinearGradients, Texts, WordGradients, unit_rows
from lightning_tracin.processes import ALONE, Processes
from lightning_tracin.waiting import Waiting

KINDS: dict[type, str] = {WordGradients: "words", LinearGradients: "linear", Texts: "texts"}

# The rows of one word lie together, so queries are faster the larger shards are; a few must fit beside a model.
_SHARD_BYTES = 256 * 2**20
_SHARD_EXAMPLES = 4096

_REPAIR = (
    "Restore the file from a copy, or fit again; if it holds gradients, it is enough to remove its folder: the next "
    "influence with the training set at hand computes them again."
)


class ShardWriter:
    """Writes the blocks of a training set, handed over shard after shard, into shards.

    A thread writes and flushes a full shard while the next one is filled. Leave the context to wait for it.

    Args:
        folder: an existing, empty folder.
        dtype: what directions are stored in. "float16" is exact to about 5e-4 of each row's norm, whatever the norm;
            "int8" to about 1 %.
        shard_examples: examples in each shard.
        first_shard: number of the first shard, where others are written by other processes.
        order: the numbers of the examples in the order in which they come, if that is not the data set's. Those of one
            shard come together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype,
        shard_examples: int,
        first_shard: int = 0,
        order: Sequence[int] | None = None,
    ) -> None:
        self.folder = folder
        self.dtype: Dtype = dtype
        self.shard_examples = shard_examples
        self.first_shard = first_shard
        self.order = order
        self.n_examples = 0
        self._kind: str | None = None
        self._waiting = Waiting()
        self._checksums: list[str] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_tracin-store")
        self._written: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, block: Block) -> None:
        """Take the next examples.

        Raises:
            OSError: if an earlier shard could not be written.
        """
        self._kind = KINDS[type(block)]
        self.n_examples += block.n_examples
        block = block if isinstance(block, Texts) else block.as_dtype(self.dtype)
        start = 0
        while start < block.n_examples:
            stop = min(block.n_examples, start + self.shard_examples - self._waiting.n_examples)
            self._waiting.add(block.slice(start, stop))
            if self._waiting.n_examples == self.shard_examples:
                self._flush()
            start = stop

    def close(self, processes: Processes = ALONE) -> None:
        """Write what is left, then the index that makes the folder readable.

        Args:
            processes: those that have written shards of the folder.
        """
        if self._waiting.n_examples:
            self._flush()
        self._wait()
        parts = processes.gather((self._kind, self.n_examples, self._checksums))
        index = {
            "kind": next((kind for kind, _, _ in parts if kind is not None), None),
            "dtype": self.dtype,
            "n_examples": sum(n_examples for _, n_examples, _ in parts),
            "shard_examples": self.shard_examples,
            "checksums": [checksum for _, _, checksums in parts for checksum in checksums],
        }
        if processes.first:
            write_json(self.folder / "index.json", index)

    def _flush(self) -> None:
        """Hand what waits to the thread, as a shard."""
        self._wait()
        waiting, before = self._waiting.block(), len(self._checksums) * self.shard_examples
        if self.order is not None:
            numbers = torch.tensor(self.order[before : before + waiting.n_examples])
            waiting = waiting.moved(numbers - self.first_shard * self.shard_examples - before, waiting.n_examples)
        shard = type(waiting).cat([waiting])  # a copy: the next examples come into the same memory
        self._waiting.clear()
        self._written = self._thread.submit(self._write, shard)

    def _write(self, shard: Block) -> None:
        path = _shard(self.folder, self.first_shard + len(self._checksums))
        self._checksums.append(write_tensors(path, encode(shard)))

    def _wait(self) -> None:
        """Wait for the thread, and raise what it raised."""
        if self._written is not None:
            self._written.result()
            self._written = None


@dataclass(frozen=True)
class Shards:
    """The blocks of a training set, as :class:`ShardWriter` left them.

    Attributes:
        folder: where the shards lie.
        kind: "words", "linear" or "texts".
        n_examples: number of examples over all shards.
        shard_examples: number of examples in each shard but the last.
        dtype: what directions are stored in.
        checksums: of each shard's file.
    """

    folder: Path
    kind: str
    n_examples: int
    shard_examples: int
    dtype: Dtype
    checksums: Sequence[str]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Open a folder of shards.

        Raises:
            FileNotFoundError: if the folder has no index: nothing was stored there, or not to the end.
            ValueError: if the index is damaged.
        """
        return cls(folder, **read_json(folder / "index.json", [each.name for each in fields(cls)[1:]]))

    def __len__(self) -> int:
        return -(-self.n_examples // self.shard_examples)

    @property
    def files(self) -> list[tuple[Path, str]]:
        """Each shard's file and its checksum."""
        return [(_shard(self.folder, shard), checksum) for shard, checksum in enumerate(self.checksums)]

    def bounds(self, shard: int) -> tuple[int, int]:
        """First example of a shard, and one past its last."""
        return shard * self.shard_examples, min((shard + 1) * self.shard_examples, self.n_examples)

    def read(self, shard: int) -> Any:
        """A shard's block, memory-mapped; examples are counted from 0 inside the shard.

        Raises:
            ValueError: if the file is not as it was written.
        """
        start, stop = self.bounds(shard)
        return decode(self.kind, self._stored(shard), slice(None), stop - start)

    def read_examples(self, examples: Sequence[int]) -> Any:
        """Some examples' block, in the order given; only the shards that hold them are read.

        Args:
            examples: numbers of examples, each once, at least one.

        Raises:
            ValueError: if a file is not as it was written.
        """
        numbers = torch.tensor(examples)
        blocks: list[Any] = []
        for shard in torch.unique(numbers // self.shard_examples).tolist():
            start, stop = self.bounds(shard)
            stored = self._stored(shard)
            wanted = torch.sort(numbers[(numbers >= start) & (numbers < stop)]).values - start
            places = torch.full((stop - start,), -1)
            places[wanted] = torch.arange(len(wanted))
            rows = torch.nonzero(places[stored["examples"].long()] >= 0)[:, 0]
            blocks.append(decode(self.kind, stored, rows, stop - start).arranged(places, len(wanted)))
        return (
            type(blocks[0]).cat(blocks).arranged(torch.argsort(numbers), len(numbers))
        )  # blocks come in ascending order

    def _stored(self, shard: int) -> dict[str, Tensor]:
        tensors, _ = read_tensors(_shard(self.folder, shard), self.checksums[shard])
        return tensors


def fitting_shard_examples(bytes_per_example: float, n_examples: int, processes: Processes = ALONE) -> int:
    """How many examples make a shard of about 256 MiB, or of less, so that every process has one."""
    fitting = min(_SHARD_EXAMPLES, int(_SHARD_BYTES / max(bytes_per_example, 1)))
    return max(1, min(fitting, -(-n_examples // processes.size) if processes.size > 1 else fitting))


def encode(block: Block) -> dict[str, Tensor]:
    """The tensors that a shard of this block holds on disk."""
    if isinstance(block, Texts):
        return {"examples": block.examples.int(), "ids": block.ids.int(), "labels": block.labels}
    if isinstance(block, WordGradients):
        tokens, counts = torch.unique_consecutive(block.tokens, return_counts=True)
        return {
            "tokens": tokens.int(),
            "offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "examples": block.examples.int(),
            "norms": block.norms,
            "directions": block.directions,
            **({} if block.lengths is None else {"lengths": block.lengths}),
        }
    return {
        "examples": block.examples.int(),
        "input_norms": block.input_norms,
        "inputs": block.inputs,
        "delta_norms": block.delta_norms,
        "deltas": block.deltas,
    }


def encoded_bytes(block: Gradients, dtype: Dtype) -> int:
    """Bytes that this block takes on disk."""
    return sum(tensor.nbytes for tensor in encode(block.as_dtype(dtype)).values())


def decode(kind: str, stored: Mapping[str, Tensor], rows: Tensor | slice, n_examples: int) -> Block:
    """The block that a shard's tensors hold, of the given rows only."""
    examples = stored["examples"][rows].long()
    if kind == "texts":
        return Texts(n_examples, examples, stored["ids"][rows].long(), stored["labels"])
    if kind == "words":
        tokens = torch.repeat_interleave(stored["tokens"].long(), stored["offsets"].diff())
        lengths = stored["lengths"][rows] if "lengths" in stored else None
        norms, directions = stored["norms"][rows], stored["directions"][rows]
        return WordGradients(n_examples, examples, tokens[rows], norms, directions, lengths)
    inputs, deltas = (stored[name][rows] for name in ("inputs", "deltas"))
    if inputs.dtype == torch.int8:
        inputs, deltas = unit_rows(inputs.float())[1], unit_rows(deltas.float())[1]
    return LinearGradients(
        n_examples, examples, stored["input_norms"][rows], inputs, stored["delta_norms"][rows], deltas
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file that appears whole or not at all, and return its checksum."""
    with appearing_file(path) as partial:
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
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing. {_REPAIR}") from error
    _check(path, status.st_size, status.st_mtime_ns, checksum)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    with appearing_file(path) as partial:
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
def appearing_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes its name when it is on disk and vanishes when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
