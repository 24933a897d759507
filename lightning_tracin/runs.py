"""Gradients in the order in which training comes upon the examples, and how they are arranged in the data set's order.

What comes is written in *runs* of some 32 MB, each ordered by example. When a checkpoint is due, each shard takes its
examples out of every run, so that memory does not grow with the training set.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients import Dtype, Texts
from lightning_tracin.processes import ALONE, Processes
from lightning_tracin.store import Block, read_tensors, write_tensors

_RUN_BYTES = 32 * 2**20


class Runs:
    """Blocks of one kind that came since the last checkpoint.

    Args:
        folder: a folder of their own, which appears with the first run.
        dtype: what directions are stored in.
    """

    def __init__(self, folder: Path, *, dtype: Dtype) -> None:
        self.folder = folder
        self.dtype: Dtype = dtype
        self._runs: list[_Run] = []
        self._waiting: list[tuple[Tensor, Tensor, Block]] = []
        self._waiting_bytes = 0

    def add(self, indices: Tensor, block: Block, when: int) -> None:
        """Take some examples.

        Args:
            indices: (block.n_examples,) their places in the data set.
            block: their gradients or texts.
            when: number of the training batch, counted alike by all processes.

        Raises:
            OSError: if a run cannot be written.
        """
        block = block if isinstance(block, Texts) else block.as_dtype(self.dtype)
        self._waiting.append((indices, torch.full_like(indices, when), block))
        self._waiting_bytes += sum(tensor.nbytes for tensor in vars(block).values() if isinstance(tensor, Tensor))
        if self._waiting_bytes >= _RUN_BYTES:
            self._write()

    def arranged(self, n_examples: int, shard_examples: int, processes: Processes = ALONE) -> Iterator[Any]:
        """The blocks of this process's shards, one after the other, out of the runs of all processes.

        Of an example that came several times the last record counts; one that never came has no rows.

        Args:
            n_examples: number of examples in the data set.
            shard_examples: examples in each shard.
            processes: those that have runs.
        """
        if self._waiting:
            self._write()
        runs = [run for of_process in processes.gather(self._runs) for run in of_process]
        for shard in processes.share(-(-n_examples // shard_examples)):
            start = shard * shard_examples
            size = min(shard_examples, n_examples - start)
            run_of, latest = torch.full((size,), -1), torch.full((size,), -1)
            parts = [run.part(start, start + size) for run in runs]
            for number, (places, when) in enumerate(parts):
                later = places[when >= latest[places]]
                run_of[later], latest[later] = number, when[when >= latest[places]]
            blocks = []
            for number, (run, (places, _)) in enumerate(zip(runs, parts, strict=True)):
                if number == 0 or bool((run_of == number).any()):  # the first also without an example: its shape counts
                    places = torch.where(run_of[places] == number, places, -1)
                    blocks.append(run.read(start, start + size).arranged(places, size))
            yield type(blocks[0]).union(blocks)

    def count(self, n_examples: int, processes: Processes = ALONE) -> int:
        """How many examples of the data set came at least once, to any of the processes."""
        came = torch.zeros(n_examples, dtype=torch.bool)
        for indices in [*(run.indices for run in self._runs), *(indices for indices, _, _ in self._waiting)]:
            came[indices] = True
        return int(torch.stack(processes.gather(came)).any(0).sum())

    def clear(self) -> None:
        """Forget what came."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._runs, self._waiting, self._waiting_bytes = [], [], 0

    def _write(self) -> None:
        """Write what waits as a run, ordered by example, each of which comes once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        came = torch.cat([indices for indices, _, _ in self._waiting])
        when = torch.cat([when for _, when, _ in self._waiting])
        blocks: list[Any] = [block for _, _, block in self._waiting]
        indices, place = torch.unique(came, return_inverse=True)
        last = torch.full((len(indices),), -1).scatter_reduce(0, place, torch.arange(len(came)), "amax")
        places = torch.full((len(came),), -1)
        places[last] = torch.arange(len(indices))
        block = type(blocks[0]).cat(blocks).arranged(places, len(indices))
        path = self.folder / f"{len(self._runs):05d}.safetensors"
        checksum = write_tensors(path, _by_example(block))
        self._runs.append(_Run(path, type(block), indices, when[last], checksum))
        self._waiting, self._waiting_bytes = [], 0


@dataclass(frozen=True)
class _Run:
    """A file of gradients or texts, ordered by example.

    Attributes:
        path: the file.
        kind: the class of its block.
        indices: (n_examples,) the places of its examples in the data set, ascending.
        when: (n_examples,) the training batches in which they came.
        checksum: of the file.
    """

    path: Path
    kind: type[Any]
    indices: Tensor
    when: Tensor
    checksum: str

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of its examples from ``start`` to ``stop`` in the data set: their places, from 0 on, and when they came."""
        rows = self._rows(start, stop)
        return self.indices[rows] - start, self.when[rows]

    def read(self, start: int, stop: int) -> Any:
        """The block of its examples from ``start`` to ``stop`` in the data set; no others are read from disk."""
        examples = self._rows(start, stop)
        stored, _ = read_tensors(self.path, self.checksum)
        bounds = torch.tensor([examples.start, examples.stop], dtype=torch.int32)
        rows = slice(*torch.searchsorted(stored["examples"], bounds).tolist())
        columns = {name: column[examples if name in _PER_EXAMPLE else rows] for name, column in stored.items()}
        columns |= {name: columns[name].long() for name in _NUMBERS & columns.keys()}
        columns["examples"] = columns["examples"] - examples.start
        return self.kind(n_examples=examples.stop - examples.start, **columns)

    def _rows(self, start: int, stop: int) -> slice:
        return slice(*torch.searchsorted(self.indices, torch.tensor([start, stop])).tolist())


_NUMBERS = {"examples", "tokens", "ids"}  # kept in 32 bits
_PER_EXAMPLE = {"labels"}  # every other column has one entry for each row


def _by_example(block: Block) -> dict[str, Tensor]:
    """The columns of a block, its rows ordered by example."""
    columns = {name: column for name, column in vars(block).items() if isinstance(column, Tensor)}
    order = torch.argsort(block.examples, stable=True)
    ordered = {name: column if name in _PER_EXAMPLE else column[order] for name, column in columns.items()}
    return {name: column.int() if name in _NUMBERS else column for name, column in ordered.items()}
