"""Gradients in the order in which training comes upon the examples, and how they are arranged in the data set's order.

What comes is written in *runs* of some 32 MB, each ordered by example. When a checkpoint is due, each shard takes its
examples out of every run, so that memory does not grow with the training set.

Of an example that comes again the last record counts, so that runs become outdated: they are removed when nothing in
them counts, and rewritten when most of what lies there does not.
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
from lightning_tracin.storage.files import read_tensors, write_tensors
from lightning_tracin.storage.row_buffer import GrowableTensor, RowBuffer

_RUN_BYTES = 32 * 2**20


class Runs:
    """Gradients and texts that came since the last checkpoint.

    Args:
        folder: a folder of their own, which appears with the first run.
        n_examples: number of examples in the data set.
        dtype: what directions are stored in.
    """

    def __init__(self, folder: Path, n_examples: int, *, dtype: Dtype) -> None:
        self.folder = folder
        self.n_examples = n_examples
        self.dtype: Dtype = dtype
        self._runs: dict[int, _Run] = {}  # by number, in the order in which they came
        self._run_of = torch.full((n_examples,), -1)  # the number of the run with an example's last record
        self._numbers = count()
        self._waiting: dict[str, RowBuffer] = {}
        self._indices, self._when = GrowableTensor(), GrowableTensor()  # of the examples that wait

    def add(self, indices: Tensor, blocks: Mapping[str, Ragged], when: int) -> None:
        """Take some examples.

        Args:
            indices: (n_examples,) their places in the data set.
            blocks: their gradients and texts, each time under the same names.
            when: number of the training batch, counted alike by all processes.

        Raises:
            OSError: if a run cannot be written.
            ValueError: if one that is rewritten is not as it was written.
        """
        for name, block in blocks.items():
            self._waiting.setdefault(name, RowBuffer()).add(block.as_dtype(self.dtype))
        self._indices.add(indices)
        self._when.add(torch.full_like(indices, when))
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= _RUN_BYTES:
            self._write()

    def arranged(self, name: str, shard_examples: int, processes: Processes = ALONE) -> Iterator[Any]:
        """The blocks of one name of this process's shards, one after the other, out of the runs of all processes.

        Rows are in no order, and lie where those of the next block will.
        Of an example that came several times the last record counts; one that never came has no rows.

        Args:
            name: see :meth:`add`.
            shard_examples: examples in each shard.
            processes: those that have runs.

        Raises:
            ValueError: if no example came to any of them.
        """
        self._write()
        runs = [run for of_process in processes.gather([*self._runs.values()]) for run in of_process]
        if not runs:
            raise ValueError("Since the last checkpoint, no training batch has given gradients that are finite.")
        rows: dict[str, GrowableTensor] = {}
        for shard in processes.share(-(-self.n_examples // shard_examples)):
            start = shard * shard_examples
            size = min(shard_examples, self.n_examples - start)
            run_of, latest = torch.full((size,), -1), torch.full((size,), -1)
            found = [run.part(start, start + size) for run in runs]
            for number, (places, when) in enumerate(found):
                later = places[when >= latest[places]]
                run_of[later], latest[later] = number, when[when >= latest[places]]
            parts = (
                run.read(name, start, start + size).moved(torch.where(run_of[places] == number, places, -1), size)
                for number, (run, (places, _)) in enumerate(zip(runs, found, strict=True))
                if number == 0 or bool((run_of == number).any())  # the first also without an example: its shape counts
            )
            yield _united(parts, rows)

    def count(self, processes: Processes = ALONE) -> int:
        """How many examples of the data set came at least once, to any of the processes."""
        self._write()
        self._waiting = {}  # their memory serves to arrange what came
        return int(torch.stack(processes.gather(self._run_of >= 0)).any(0).sum())

    def clear(self) -> None:
        """Forget what came."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._runs = {}
        self._run_of.fill_(-1)
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        for waiting in self._waiting.values():
            waiting.clear()
        self._indices.clear()
        self._when.clear()

    def _write(self) -> None:
        """Write what waits as a run, ordered by example, each of which comes once."""
        came, when = self._indices.rows, self._when.rows
        if len(came) == 0:
            return
        number, folder = self._new()
        indices, place = torch.unique(came, return_inverse=True)
        last = torch.full((len(indices),), -1).scatter_reduce(0, place, torch.arange(len(came)), "amax")
        places = torch.full((len(came),), -1)
        places[last] = torch.arange(len(indices))
        kinds, checksums = {}, {}
        for name, waiting in self._waiting.items():
            block = waiting.block()
            kinds[name] = type(block)
            checksums[name] = write_tensors(folder / f"{name}.safetensors", _by_example(block, places, last))
        self._runs[number] = _Run(folder, kinds, indices, when[last], checksums)
        self._run_of[indices] = number
        self._forget_waiting()
        self._forget_outdated()

    def _new(self) -> tuple[int, Path]:
        """A number for a run, and its folder."""
        number = next(self._numbers)
        folder = self.folder / f"{number:05d}"
        folder.mkdir(parents=True)
        return number, folder

    def _forget_outdated(self) -> None:
        """Remove runs in which nothing counts; where too much of what is left is outdated, make others smaller.

        Where every example comes once an epoch, no run outlives the second epoch after its own, and none is rewritten.
        A weighted sampler, or one that deals the examples out to several processes anew at each epoch, brings some back
        after many epochs only. So that each of their runs is not kept for the sake of these, those in which less than
        half counts are then rewritten: each time to less than half, so that all of it costs no more than the runs did.
        """
        counting = torch.bincount(self._run_of[self._run_of >= 0]).tolist()
        for number, run in list(self._runs.items()):
            if not counting[number]:
                shutil.rmtree(run.folder)
                del self._runs[number]
        *_, newest = self._runs.values()
        if sum(len(run.indices) for run in self._runs.values()) <= 2 * (sum(counting) + len(newest.indices)):
            return
        for number, run in list(self._runs.items()):
            if 2 * counting[number] < len(run.indices):
                self._runs[number] = run.only(self._run_of[run.indices] == number, self._new()[1])
                shutil.rmtree(run.folder)


@dataclass(frozen=True)
class _Run:
    """Files of gradients and texts, ordered by example.

    Attributes:
        folder: of the files.
        kinds: the class of each file's block, by name.
        indices: (n_examples,) the places of its examples in the data set, ascending.
        when: (n_examples,) the training batches in which they came.
        checksums: of the files, by name.
    """

    folder: Path
    kinds: dict[str, type[Any]]
    indices: Tensor
    when: Tensor
    checksums: dict[str, str]

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of its examples from ``start`` to ``stop`` in the data set: their places, from 0 on, and when they came."""
        rows = self._rows(start, stop)
        return self.indices[rows] - start, self.when[rows]

    def read(self, name: str, start: int, stop: int) -> Any:
        """The block of its examples from ``start`` to ``stop`` in the data set; no others are read from disk."""
        examples = self._rows(start, stop)
        stored, _ = read_tensors(self.folder / f"{name}.safetensors", self.checksums[name])
        bounds = torch.tensor([examples.start, examples.stop], dtype=torch.int32)
        rows = slice(*torch.searchsorted(stored["examples"], bounds).tolist())
        columns = {key: column[examples if key in _PER_EXAMPLE else rows] for key, column in stored.items()}
        columns |= {key: columns[key].long() for key in _NUMBERS & columns.keys()}
        columns["examples"] = columns["examples"] - examples.start
        return self.kinds[name](n_examples=examples.stop - examples.start, **columns)

    def only(self, kept: Tensor, folder: Path) -> _Run:
        """Some of its examples, as a run in another folder.

        Args:
            kept: (n_examples,) which of them.
            folder: an empty one.
        """
        places = kept.cumsum(0) - 1
        checksums = {}
        for name, checksum in self.checksums.items():
            stored, _ = read_tensors(self.folder / f"{name}.safetensors", checksum)
            rows = kept[stored["examples"].long()]
            columns = {key: column[kept if key in _PER_EXAMPLE else rows] for key, column in stored.items()}
            columns["examples"] = places[columns["examples"].long()].int()
            checksums[name] = write_tensors(folder / f"{name}.safetensors", columns)
        return _Run(folder, self.kinds, self.indices[kept], self.when[kept], checksums)

    def _rows(self, start: int, stop: int) -> slice:
        return slice(*torch.searchsorted(self.indices, torch.tensor([start, stop])).tolist())


def max_run_bytes(bytes_of_pass: float, passes: float, n_processes: int) -> float:
    """What the runs of all processes may take together before a checkpoint clears them.

    There is no more than came. Nor is there more in each process than two records for each example that came to it, and
    three runs: the newest counts twice, and one may be there twice while it is rewritten. Where samplers deal the
    examples out anew at each epoch, the whole data set comes to each process in time.

    Args:
        bytes_of_pass: what the records of the whole data set take.
        passes: how many records come, to all processes together, over the number of examples in the data set.
        n_processes: how many processes have runs.
    """
    return min(passes * bytes_of_pass, n_processes * (2 * bytes_of_pass + 3 * _RUN_BYTES))


_NUMBERS = {"examples", "tokens", "ids"}  # kept in 32 bits

_PER_EXAMPLE = {"labels"}  # every other column has one entry for each row


def _united(parts: Iterable[Any], rows: dict[str, GrowableTensor]) -> Any:
    """One block of parts that have the same examples, of which only one has rows of any example.

    Args:
        parts: one after the other.
        rows: where to copy their rows to.
    """
    per_example: dict[str, Tensor] = {}
    for column in rows.values():
        column.clear()
    for part in parts:
        for name, value in vars(part).items():
            if name in _PER_EXAMPLE:
                known = per_example.get(name, value)
                per_example[name] = torch.where(torch.isnan(known), value, known)
            elif isinstance(value, Tensor):
                rows.setdefault(name, GrowableTensor()).add(value)
    return type(part)(part.n_examples, **per_example, **{name: column.rows for name, column in rows.items()})


def _by_example(block: Ragged, places: Tensor, last: Tensor) -> dict[str, Tensor]:
    """The columns of a block, its examples moved to their places, and its rows in the order of these.

    Args:
        block: what waits.
        places: (block.n_examples,) of each example, -1 where it came again later.
        last: the examples that have a place, in the order of the places.
    """
    moved = places[block.examples]
    order = torch.argsort(moved, stable=True)[int((moved < 0).sum()) :]
    columns = {name: column for name, column in vars(block).items() if isinstance(column, Tensor)}
    columns = {name: column[last if name in _PER_EXAMPLE else order] for name, column in columns.items()}
    columns["examples"] = moved[order]
    return {name: column.int() if name in _NUMBERS else column for name, column in columns.items()}
