"""Gradients and texts on disk: shards with a fixed number of examples each, memory-mapped when they are read.

A folder of shards has ``00000.safetensors``, ``00001.safetensors``, ... and ``index.json``, which is written last and
contains the checksum of each. Shard ``j`` has the examples from ``j * shard_examples`` to ``(j + 1) * shard_examples``
(exclusive). Word gradients are sorted by token, so that a query reads only the rows of its own words from disk.
A shard without a single example that training drew has no file. Where gradients are of K-FAC's components, those are in
``components.safetensors``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from lightning_tracin.gradients.kronecker import KroneckerFactors
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.components import COMPONENTS, read_factors, write_factors
from lightning_tracin.storage.encoding import decode, encode
from lightning_tracin.storage.files import read_tensors, size_of, write_tensors
from lightning_tracin.storage.layouts import ShardLayout
from lightning_tracin.storage.row_buffer import RowBuffer
from lightning_tracin.storage.schemas import MOST_SHARD_EXAMPLES, IndexFile, TraceHeader, read, write

# Rows of one word are contiguous, so queries are faster with larger shards; a few must fit in memory beside a model.
_SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Writes the blocks of a training set into shards.

    A thread writes a full shard to disk while the next one is filled. Leaving the context waits for the thread.

    Args:
        folder: an existing, empty folder.
        dtype: the type that directions are stored in. The relative error of a row is about 5e-4 in "float16" and about
            1 % in "int8", whatever its norm.
        shard_examples: number of examples in each shard.
        examples: the indices of the examples whose shards this writer has: those of complete shards.
        order: the indices of the examples in the order in which they are added; None for all, in the order of the data
            set. Examples of one shard must be added together; those that are not added have no rows.
        factors: those of K-FAC whose components the gradients are of, if they are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype,
        shard_examples: int,
        examples: range,
        order: Sequence[int] | None = None,
        factors: KroneckerFactors | None = None,
    ) -> None:
        self.folder = folder
        self.factors = factors
        self.dtype: Dtype = dtype
        self.shard_examples = shard_examples
        self.examples = examples
        self._kind: str | None = None
        self._waiting = RowBuffer()
        self._first_shard = examples.start // shard_examples
        self._checksums: list[str | None] = [None] * -(-len(examples) // shard_examples)
        by_shard = groupby(examples if order is None else order, key=lambda index: index // shard_examples)
        self._to_come = deque((shard, torch.tensor(list(indices))) for shard, indices in by_shard)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_tracin-store")
        self._written: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, block: Ragged) -> None:
        """Add the next examples.

        Raises:
            OSError: if an earlier shard could not be written.
        """
        self._kind = block.KIND
        block = block.as_dtype(self.dtype)
        start = 0
        while start < block.n_examples:
            shard, indices = self._to_come[0]
            stop = min(block.n_examples, start + len(indices) - self._waiting.n_examples)
            self._waiting.add(block.slice(start, stop))
            if self._waiting.n_examples == len(indices):
                self._flush(shard, indices)
                self._to_come.popleft()
            start = stop

    def close(self, processes: Processes = ALONE, not_finite: Sequence[int] = ()) -> None:
        """Write the index that makes the folder readable, when every example has been added.

        Args:
            processes: the processes that write shards of the folder; every one of them must call it.
            not_finite: the examples, of all processes, whose gradients are zero because they were not finite.

        Raises:
            OSError: if a file could not be written.
        """
        self._wait()
        gathered = processes.gather((self._kind, len(self.examples), self._checksums))
        index: dict[str, Any] = {
            "kind": next((kind for kind, _, _ in gathered if kind is not None), None),
            "dtype": self.dtype,
            "n_examples": sum(n_examples for _, n_examples, _ in gathered),
            "shard_examples": self.shard_examples,
            "checksums": [checksum for _, _, checksums in gathered for checksum in checksums],
            "not_finite": list(not_finite),
        }
        if processes.first:
            if self.factors is not None:
                index["components"] = write_factors(self.folder / COMPONENTS, self.factors)
            write(self.folder / "index.json", IndexFile(**index))

    def _flush(self, shard: int, indices: Tensor) -> None:
        """Submit the buffered examples, of these indices, to the thread, as a shard."""
        self._wait()
        start = shard * self.shard_examples
        size = min(self.shard_examples, self.examples.stop - start)
        block = self._waiting.block().moved(indices - start, size)
        copied = type(block).cat([block])  # because the buffer is reused for the next examples
        self._waiting.clear()
        self._written = self._thread.submit(self._write, shard, copied)

    def _write(self, shard: int, block: Ragged) -> None:
        path = _shard_file(self.folder, shard)
        self._checksums[shard - self._first_shard] = write_tensors(path, encode(block))

    def _wait(self) -> None:
        """Wait until the thread has written its shard, and raise its error if it failed."""
        if self._written is not None:
            self._written.result()
            self._written = None


@dataclass(frozen=True)
class Shards:
    """The blocks of a training set that :class:`ShardWriter` wrote.

    Attributes:
        folder: the folder of the shards.
        within: the folder that no link may lead out of.
        kind: "words", "factors", "matrix" or "texts".
        n_examples: number of examples over all shards.
        shard_examples: number of examples in each shard except the last.
        dtype: the type that directions are stored in.
        checksums: the checksum of each shard's file; None for a shard that has none, because it holds no rows.
        not_finite: the examples whose gradients are zero because they were not finite.
        components: the checksum of the file of K-FAC's components, if gradients are of these.
    """

    folder: Path
    within: Path
    kind: str
    n_examples: int
    shard_examples: int
    dtype: Dtype
    checksums: Sequence[str | None]
    not_finite: Sequence[int] = ()
    components: str | None = None

    @classmethod
    def open(cls, folder: Path, *, within: Path | None = None) -> Shards:
        """Open a folder of shards.

        Args:
            folder: the folder.
            within: the folder that no link may lead out of; by default the same.

        Raises:
            FileNotFoundError: if the folder has no index, because nothing was stored there or storing was interrupted.
            ValueError: if the index is damaged.
        """
        within = folder if within is None else within
        index: dict[str, Any] = msgspec.structs.asdict(read(folder / "index.json", IndexFile, within=within))
        del index["checksum"]
        return cls(folder, within, **index)

    def checked(self, kind: str, header: TraceHeader) -> Shards:
        """These shards, if they are what a trace says that they are.

        Args:
            kind: what they should hold.
            header: of the trace.

        Raises:
            ValueError: if the index says otherwise.
        """
        actual = (self.kind, self.dtype, self.n_examples, self.shard_examples)
        expected = (kind, header.dtype, header.n_train, header.shard_examples)
        if actual != expected or len(self.checksums) != len(self):
            raise ValueError(
                f"{self.folder / 'index.json'} is damaged: it counts {self.n_examples} examples in "
                f"{len(self.checksums)} shards of {self.shard_examples}, {self.kind} in {self.dtype}, but the trace "
                f"has {header.n_train} in shards of {header.shard_examples}, {kind} in {header.dtype}. Restore it "
                "from a copy, or fit again; of gradients it is enough to remove the folder."
            )
        return self

    def __len__(self) -> int:
        return -(-self.n_examples // self.shard_examples)

    @property
    def files(self) -> list[tuple[Path, str]]:
        """Each shard's file and its checksum, of those that have one."""
        numbered = enumerate(self.checksums)
        return [(_shard_file(self.folder, shard), checksum) for shard, checksum in numbered if checksum is not None]

    @property
    def nbytes(self) -> int:
        """The number of bytes of all shards on disk."""
        return sum(size_of(file) for file, _ in self.files)

    def holds(self, shard: int) -> bool:
        """Whether a shard has a file; else none of its examples has any rows."""
        return self.checksums[shard] is not None

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first example of a shard, and the one after its last."""
        return shard * self.shard_examples, min((shard + 1) * self.shard_examples, self.n_examples)

    def factors(self, site: Site) -> KroneckerFactors | None:
        """The factors of K-FAC whose components the gradients at a site are of; None where they are whole.

        Raises:
            FileNotFoundError: if their file is missing.
            ValueError: if there is none, or it is not as it was written.
        """
        if site.rank is None:
            return None
        if self.components is None:
            raise ValueError(f"{self.folder / 'index.json'} is damaged: it names no components of {site.layer!r}.")
        return read_factors(self.folder / COMPONENTS, self.components, site.rank, within=self.within)

    def read(self, shard: int) -> Any:
        """The block of a shard that has a file, memory-mapped, with examples numbered from 0 inside the shard.

        Raises:
            FileNotFoundError: if the shard's file is missing.
            ValueError: if its checksum differs.
        """
        start, stop = self.bounds(shard)
        return decode(self.kind, self._stored(shard), slice(None), stop - start)

    def read_examples(self, examples: Sequence[int]) -> Any:
        """The block of some examples, in the given order; only their shards are read.

        Args:
            examples: distinct indices of examples, at least one.

        Raises:
            FileNotFoundError: if a shard's file is missing.
            ValueError: if its checksum differs.
        """
        indices, order = torch.sort(torch.tensor(examples))
        asked = torch.unique(indices // self.shard_examples).tolist()
        held = [shard for shard in range(len(self)) if self.holds(shard)]
        found: list[Tensor] = []
        blocks: list[Any] = []
        for shard in [shard for shard in asked if self.holds(shard)] or held[:1]:
            start, stop = self.bounds(shard)
            stored = self._stored(shard)
            in_shard = indices[(indices >= start) & (indices < stop)]
            places = torch.full((stop - start,), -1)
            places[in_shard - start] = torch.arange(len(in_shard))
            rows = torch.nonzero(places[stored["examples"].long()] >= 0)[:, 0]
            blocks.append(decode(self.kind, stored, rows, stop - start).arranged(places, len(in_shard)))
            found.append(in_shard)
        in_given_order = order[torch.searchsorted(indices, torch.cat(found))]
        return type(blocks[0]).cat(blocks).arranged(in_given_order, len(indices))

    def _stored(self, shard: int) -> dict[str, Tensor]:
        checksum = self.checksums[shard]
        assert checksum is not None
        start, stop = self.bounds(shard)
        layout = ShardLayout(self.kind, self.dtype, stop - start)
        tensors, _ = read_tensors(_shard_file(self.folder, shard), checksum, layout, within=self.within)
        return tensors


def fitting_shard_examples(bytes_per_example: float, n_examples: int, processes: Processes = ALONE) -> int:
    """The number of examples in a shard of at most about 256 MiB, with at least one shard for every process.

    Args:
        bytes_per_example: mean size of an example's gradient on disk.
        n_examples: number of examples in the training set.
        processes: the processes that share the shards.
    """
    fitting = min(MOST_SHARD_EXAMPLES, int(_SHARD_BYTES / max(bytes_per_example, 1)))
    return max(1, min(fitting, -(-n_examples // processes.size) if processes.size > 1 else fitting))


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
