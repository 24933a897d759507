"""External sorting of gradients: from the order in which training reads the examples to the data set's order.

Records (an example's gradients and text) are written in *runs* of about 32 MB, each sorted by example. At a checkpoint,
each shard reads its examples from every run, so that memory does not grow with the training set.

Only the last record of an example counts. A run in which no record counts any longer is removed, and runs with mostly
outdated records are compacted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.encoding import integers_in_32_bits, integers_in_64_bits
from lightning_tracin.storage.files import read_tensors, write_tensors
from lightning_tracin.storage.row_buffer import GrowableTensor, RowBuffer

_RUN_BYTES = 32 * 2**20  # size at which the buffered records are written as a run


class Runs:
    """The records of gradients and texts since the last checkpoint, in one process.

    Args:
        folder: a folder for the runs alone, which is created with the first run.
        n_examples: number of examples in the data set.
        dtype: the type that directions are stored in.
    """

    def __init__(self, folder: Path, n_examples: int, *, dtype: Dtype) -> None:
        self.folder = folder
        self.n_examples = n_examples
        self.dtype: Dtype = dtype
        self._runs: dict[int, _Run] = {}  # by number, oldest first
        self._run_of = torch.full((n_examples,), -1)  # the run with each example's last record; -1 for none
        self._numbers = count()
        self._buffers: dict[str, RowBuffer] = {}  # the records that are not yet in a run, by the blocks' names
        self._indices, self._batch_numbers = GrowableTensor(), GrowableTensor()  # of the buffered records

    def add(self, indices: Tensor, blocks: Mapping[str, Ragged], when: int) -> None:
        """Add the records of a training batch.

        Args:
            indices: (n_batch,) int64, the examples' indices in the data set.
            blocks: their gradients and texts, under the same names in every call.
            when: number of the training batch, which all processes count alike.

        Raises:
            OSError: if a run cannot be written.
            ValueError: if the checksum of a run that is compacted differs.
        """
        for name, block in blocks.items():
            self._buffers.setdefault(name, RowBuffer()).add(block.as_dtype(self.dtype))
        self._indices.add(indices)
        self._batch_numbers.add(torch.full_like(indices, when))
        if sum(buffer.nbytes for buffer in self._buffers.values()) >= _RUN_BYTES:
            self._write_run()

    def arranged(self, name: str, shard_examples: int, processes: Processes = ALONE) -> Iterator[Any]:
        """The blocks of this process's shards under one name, from the runs of all processes.

        The rows of a block are not sorted, and are in memory that the next block overwrites. An example without a
        record has no rows.

        Args:
            name: a name of blocks, as in :meth:`add`.
            shard_examples: number of examples in each shard.
            processes: the processes that have runs; every one of them must iterate.

        Yields:
            The block of each shard, in ascending order.

        Raises:
            ValueError: if no process has a record, or the checksum of a run differs.
        """
        self._write_run()
        runs = [run for process_runs in processes.gather([*self._runs.values()]) for run in process_runs]
        if not runs:
            raise ValueError("Since the last checkpoint, no training batch has given gradients that are finite.")
        rows: dict[str, GrowableTensor] = {}
        for shard in processes.share(-(-self.n_examples // shard_examples)):
            start = shard * shard_examples
            size = min(shard_examples, self.n_examples - start)
            run_of, latest = torch.full((size,), -1), torch.full((size,), -1)
            records = [run.records(start, start + size) for run in runs]
            for number, (places, batch_numbers) in enumerate(records):
                is_later = batch_numbers >= latest[places]
                later = places[is_later]
                run_of[later], latest[later] = number, batch_numbers[is_later]
            blocks = (
                run.read(name, start, start + size).moved(torch.where(run_of[places] == number, places, -1), size)
                for number, (run, (places, _)) in enumerate(zip(runs, records, strict=True))
                if number == 0 or bool((run_of == number).any())  # the first run gives an empty block its columns
            )
            yield _union(blocks, rows)

    def count(self, processes: Processes = ALONE) -> int:
        """The number of examples of the data set that have a record in any process. Every process must call it."""
        self._write_run()
        self._buffers = {}  # frees memory for :meth:`arranged`
        return int(torch.stack(processes.gather(self._run_of >= 0)).any(0).sum())

    def clear(self) -> None:
        """Remove all records."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._runs = {}
        self._run_of.fill_(-1)
        self._clear_buffers()

    def _clear_buffers(self) -> None:
        for buffer in self._buffers.values():
            buffer.clear()
        self._indices.clear()
        self._batch_numbers.clear()

    def _write_run(self) -> None:
        """Write the buffered records as a run: the last record of each example, sorted by example."""
        buffered, batch_numbers = self._indices.rows, self._batch_numbers.rows
        if len(buffered) == 0:
            return
        number, folder = self._new_folder()
        indices, place = torch.unique(buffered, return_inverse=True)
        last = torch.full((len(indices),), -1).scatter_reduce(0, place, torch.arange(len(buffered)), "amax")
        places = torch.full((len(buffered),), -1)
        places[last] = torch.arange(len(indices))
        kinds, checksums = {}, {}
        for name, buffer in self._buffers.items():
            block = buffer.block()
            kinds[name] = type(block)
            checksums[name] = write_tensors(folder / f"{name}.safetensors", _sorted_columns(block, places, last))
        self._runs[number] = _Run(folder, kinds, indices, batch_numbers[last], checksums)
        self._run_of[indices] = number
        self._clear_buffers()
        self._remove_outdated()

    def _new_folder(self) -> tuple[int, Path]:
        """The number of a new run, and its folder."""
        number = next(self._numbers)
        folder = self.folder / f"{number:05d}"
        folder.mkdir(parents=True)
        return number, folder

    def _remove_outdated(self) -> None:
        """Remove runs without a current record, and compact runs if more than half of all records are outdated.

        If training reads every example once an epoch, a run is removed by the end of the next epoch, and none is
        compacted. A weighted sampler, or one that redistributes the examples over the processes at each epoch, reads
        some examples again only after many epochs, and their last records would keep nearly every run. Compaction
        rewrites a run when less than half of it is current. Each time it shrinks to less than half, so that all
        compactions of a run write less than the run itself did.
        """
        n_current = torch.bincount(self._run_of[self._run_of >= 0]).tolist()
        for number, run in list(self._runs.items()):
            if not n_current[number]:
                shutil.rmtree(run.folder)
                del self._runs[number]
        *_, newest = self._runs.values()
        if sum(len(run.indices) for run in self._runs.values()) <= 2 * (sum(n_current) + len(newest.indices)):
            return
        for number, run in list(self._runs.items()):
            if 2 * n_current[number] < len(run.indices):
                self._runs[number] = run.compacted(self._run_of[run.indices] == number, self._new_folder()[1])
                shutil.rmtree(run.folder)


def max_run_bytes(bytes_of_pass: float, passes: float, n_processes: int) -> float:
    """An upper bound of the bytes that the runs of all processes take before a checkpoint clears them.

    Two bounds hold. All runs together have at most the records that were added. And each process has at most two
    records for each example, plus three runs: the newest one counts twice in the condition for compaction, and a run
    exists twice while it is compacted. A sampler that redistributes the examples at each epoch brings every example to
    each process in time, so the second bound applies to the whole data set.

    Args:
        bytes_of_pass: bytes of one record for each example of the data set.
        passes: number of records that all processes add, divided by the number of examples in the data set.
        n_processes: number of processes that have runs.
    """
    return min(passes * bytes_of_pass, n_processes * (2 * bytes_of_pass + 3 * _RUN_BYTES))


@dataclass(frozen=True)
class _Run:
    """The files of one run, sorted by example.

    Attributes:
        folder: the folder of the files.
        kinds: the class of each block, by name.
        indices: (n_examples,) int64, the examples' indices in the data set, ascending.
        batch_numbers: (n_examples,) int64, the training batch of each example's record.
        checksums: the checksum of each block's file, by name.
    """

    folder: Path
    kinds: dict[str, type[Any]]
    indices: Tensor
    batch_numbers: Tensor
    checksums: dict[str, str]

    def records(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The indices, relative to ``start``, and the batch numbers of the examples from ``start`` to ``stop``."""
        examples = self._examples(start, stop)
        return self.indices[examples] - start, self.batch_numbers[examples]

    def read(self, name: str, start: int, stop: int) -> Any:
        """The block of the run's examples from ``start`` to ``stop`` in the data set; only these are read from disk.

        Raises:
            ValueError: if the file's checksum differs.
        """
        examples, kind = self._examples(start, stop), self.kinds[name]
        stored, _ = read_tensors(self.folder / f"{name}.safetensors", self.checksums[name])
        bounds = torch.tensor([examples.start, examples.stop], dtype=torch.int32)
        rows = slice(*torch.searchsorted(stored["examples"], bounds).tolist())
        columns = {key: column[examples if key in kind.PER_EXAMPLE else rows] for key, column in stored.items()}
        columns = integers_in_64_bits(columns)
        columns["examples"] = columns["examples"] - examples.start
        return kind(n_examples=examples.stop - examples.start, **columns)

    def compacted(self, is_current: Tensor, folder: Path) -> _Run:
        """A run of some of the examples, written to another folder.

        Args:
            is_current: (n_examples,) bool, the examples to write.
            folder: an empty folder.

        Raises:
            OSError: if a file cannot be written.
            ValueError: if a file's checksum differs.
        """
        places = is_current.cumsum(0) - 1
        checksums = {}
        for name, checksum in self.checksums.items():
            stored, _ = read_tensors(self.folder / f"{name}.safetensors", checksum)
            per_example, rows = self.kinds[name].PER_EXAMPLE, is_current[stored["examples"].long()]
            columns = {key: column[is_current if key in per_example else rows] for key, column in stored.items()}
            columns["examples"] = places[columns["examples"].long()].int()
            checksums[name] = write_tensors(folder / f"{name}.safetensors", columns)
        return _Run(folder, self.kinds, self.indices[is_current], self.batch_numbers[is_current], checksums)

    def _examples(self, start: int, stop: int) -> slice:
        """The places in this run of the examples from ``start`` to ``stop`` in the data set."""
        return slice(*torch.searchsorted(self.indices, torch.tensor([start, stop])).tolist())


def _union(blocks: Iterable[Any], rows: dict[str, GrowableTensor]) -> Any:
    """The union of blocks with the same examples; each example has rows in at most one of them.

    Args:
        blocks: the blocks, at least one, which are read one at a time.
        rows: the memory that rows are copied to, by column; it is cleared first.
    """
    per_example: dict[str, Tensor] = {}
    for column in rows.values():
        column.clear()
    for block in blocks:
        for name, column in block.columns.items():
            if name in block.PER_EXAMPLE:
                known = per_example.get(name, column)
                per_example[name] = torch.where(torch.isnan(known), column, known)
            else:
                rows.setdefault(name, GrowableTensor()).add(column)
    return type(block)(block.n_examples, **per_example, **{name: memory.rows for name, memory in rows.items()})


def _sorted_columns(block: Ragged, places: Tensor, last: Tensor) -> dict[str, Tensor]:
    """The columns of a block as a run stores them: sorted by example, without superseded records.

    Args:
        block: the buffered records, in the order in which they were added.
        places: (block.n_examples,) the place of each record in the run; -1 for one that a later record supersedes.
        last: the records that have a place, in the order of the places.
    """
    examples = places[block.examples]
    order = torch.argsort(examples, stable=True)[int((examples < 0).sum()) :]
    columns = {name: column[last if name in block.PER_EXAMPLE else order] for name, column in block.columns.items()}
    columns["examples"] = examples[order]
    return integers_in_32_bits(columns)
