"""Gradients in the order in which training comes upon the examples, and how they are arranged in the data set's order.

What comes is written in *runs* of some 32 MB, each ordered by example. When a checkpoint is due, each shard takes its
examples out of every run, so that memory does not grow with the training set.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients import Block, Dtype, Texts
from lightning_tracin.processes import ALONE, Processes
from lightning_tracin.store import read_tensors, write_tensors
from lightning_tracin.waiting import Column, Waiting

_RUN_BYTES = 32 * 2**20


class Runs:
    """Gradients and texts that came since the last checkpoint.

    Args:
        folder: a folder of their own, which appears with the first run.
        dtype: what directions are stored in.
    """

    def __init__(self, folder: Path, *, dtype: Dtype) -> None:
        self.folder = folder
        self.dtype: Dtype = dtype
        self._runs: list[_Run] = []
        self._waiting: dict[str, Waiting] = {}
        self._indices, self._when = Column(), Column()  # of the examples that wait

    def add(self, indices: Tensor, blocks: Mapping[str, Block], when: int) -> None:
        """Take some examples.

        Args:
            indices: (n_examples,) their places in the data set.
            blocks: their gradients and texts, each time under the same names.
            when: number of the training batch, counted alike by all processes.

        Raises:
            OSError: if a run cannot be written.
        """
        for name, block in blocks.items():
            block = block if isinstance(block, Texts) else block.as_dtype(self.dtype)
            self._waiting.setdefault(name, Waiting()).add(block)
        self._indices.add(indices)
        self._when.add(torch.full_like(indices, when))
        if sum(waiting.nbytes for waiting in self._waiting.values()) >= _RUN_BYTES:
            self._write()

    def arranged(self, name: str, n_examples: int, shard_examples: int, processes: Processes = ALONE) -> Iterator[Any]:
        """The blocks of one name of this process's shards, one after the other, out of the runs of all processes.

        Rows are in no order, and lie where those of the next block will.
        Of an example that came several times the last record counts; one that never came has no rows.

        Args:
            name: see :meth:`add`.
            n_examples: number of examples in the data set.
            shard_examples: examples in each shard.
            processes: those that have runs.

        Raises:
            ValueError: if no example came to any of them.
        """
        self._write()
        runs = [run for of_process in processes.gather(self._runs) for run in of_process]
        if not runs:
            raise ValueError("Since the last checkpoint, no training batch has given gradients that are finite.")
        rows: dict[str, Column] = {}
        for shard in processes.share(-(-n_examples // shard_examples)):
            start = shard * shard_examples
            size = min(shard_examples, n_examples - start)
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

    def count(self, n_examples: int, processes: Processes = ALONE) -> int:
        """How many examples of the data set came at least once, to any of the processes."""
        self._write()
        self._waiting = {}  # their memory serves to arrange what came
        came = torch.zeros(n_examples, dtype=torch.bool)
        for run in self._runs:
            came[run.indices] = True
        return int(torch.stack(processes.gather(came)).any(0).sum())

    def clear(self) -> None:
        """Forget what came."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._runs = []
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
        folder = self.folder / f"{len(self._runs):05d}"
        folder.mkdir(parents=True)
        indices, place = torch.unique(came, return_inverse=True)
        last = torch.full((len(indices),), -1).scatter_reduce(0, place, torch.arange(len(came)), "amax")
        places = torch.full((len(came),), -1)
        places[last] = torch.arange(len(indices))
        kinds, checksums = {}, {}
        for name, waiting in self._waiting.items():
            block = waiting.block()
            kinds[name] = type(block)
            checksums[name] = write_tensors(folder / f"{name}.safetensors", _by_example(block, places, last))
        self._runs.append(_Run(folder, kinds, indices, when[last], checksums))
        self._forget_waiting()


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

    def _rows(self, start: int, stop: int) -> slice:
        return slice(*torch.searchsorted(self.indices, torch.tensor([start, stop])).tolist())


_NUMBERS = {"examples", "tokens", "ids"}  # kept in 32 bits
_PER_EXAMPLE = {"labels"}  # every other column has one entry for each row


def _united(parts: Iterable[Any], rows: dict[str, Column]) -> Any:
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
                rows.setdefault(name, Column()).add(value)
    return type(part)(part.n_examples, **per_example, **{name: column.rows for name, column in rows.items()})


def _by_example(block: Block, places: Tensor, last: Tensor) -> dict[str, Tensor]:
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
