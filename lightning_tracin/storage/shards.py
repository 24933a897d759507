"""Gradients and texts on disk: shards of safetensors, each with a fixed number of examples, memory-mapped when read.

A folder holds ``00000.safetensors``, ``00001.safetensors``, ... and ``index.json``, which is written last and knows the
checksum of each. Shard ``j`` holds examples ``j * shard_examples`` up to ``(j + 1) * shard_examples``. Word gradients
are sorted by token, so that a query touches only the rows of the words that it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.encoding import decode, encode
from lightning_tracin.storage.files import read_json, read_tensors, size_of, write_json, write_tensors
from lightning_tracin.storage.row_buffer import RowBuffer

# The rows of one word lie together, so queries are faster the larger shards are; a few must fit beside a model.
_SHARD_BYTES = 256 * 2**20

_SHARD_EXAMPLES = 4096


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
        self._waiting = RowBuffer()
        self._checksums: list[str] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_tracin-store")
        self._written: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, block: Ragged) -> None:
        """Take the next examples.

        Raises:
            OSError: if an earlier shard could not be written.
        """
        self._kind = block.KIND
        self.n_examples += block.n_examples
        block = block.as_dtype(self.dtype)
        start = 0
        while start < block.n_examples:
            stop = min(block.n_examples, start + self.shard_examples - self._waiting.n_examples)
            self._waiting.add(block.slice(start, stop))
            if self._waiting.n_examples == self.shard_examples:
                self._flush()
            start = stop

    def close(self, processes: Processes = ALONE, not_finite: Sequence[int] = ()) -> None:
        """Write what is left, then the index that makes the folder readable.

        Args:
            processes: those that have written shards of the folder.
            not_finite: the examples, of all processes, whose gradients are zero because they were not finite.
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
            "not_finite": list(not_finite),
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

    def _write(self, shard: Ragged) -> None:
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
        kind: "words", "factors", "matrix" or "texts".
        n_examples: number of examples over all shards.
        shard_examples: number of examples in each shard but the last.
        dtype: what directions are stored in.
        checksums: of each shard's file.
        not_finite: the examples whose gradients are zero because they were not finite.
    """

    folder: Path
    kind: str
    n_examples: int
    shard_examples: int
    dtype: Dtype
    checksums: Sequence[str]
    not_finite: Sequence[int] = ()

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

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(size_of(file) for file, _ in self.files)

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
        # blocks come in ascending order
        return type(blocks[0]).cat(blocks).arranged(torch.argsort(numbers), len(numbers))

    def _stored(self, shard: int) -> dict[str, Tensor]:
        tensors, _ = read_tensors(_shard(self.folder, shard), self.checksums[shard])
        return tensors


def fitting_shard_examples(bytes_per_example: float, n_examples: int, processes: Processes = ALONE) -> int:
    """How many examples make a shard of about 256 MiB, or of less, so that every process has one."""
    fitting = min(_SHARD_EXAMPLES, int(_SHARD_BYTES / max(bytes_per_example, 1)))
    return max(1, min(fitting, -(-n_examples // processes.size) if processes.size > 1 else fitting))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
