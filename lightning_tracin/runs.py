"""Gradients in the order in which training comes upon the examples, and how they are arranged in the data set's order.

What comes is written in *runs* of some 64 MB. When a checkpoint is due, each shard takes its examples out of every run,
so that memory does not grow with the training set.
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
from lightning_tracin.store import KINDS, Block, decode, encode, read_tensors, write_tensors

_RUN_BYTES = 64 * 2**20


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
            run_of = torch.full((size,), -1)
            row_of = torch.full((size,), -1)
            latest = torch.full((size,), -1)
            for number, run in enumerate(runs):
                rows = torch.nonzero((run.indices >= start) & (run.indices < start + size))[:, 0]
                last = torch.full((size,), -1).scatter_reduce(0, run.indices[rows] - start, rows, "amax")
                later = (last >= 0) & (run.when[last] >= latest)
                run_of[later], row_of[later], latest[later] = number, last[later], run.when[last[later]]
            blocks = []
            for number, run in enumerate(runs):
                if number == 0 or bool((run_of == number).any()):  # the first also without an example: its shape counts
                    places = torch.full((len(run.indices),), -1)
                    examples = torch.nonzero(run_of == number)[:, 0]
                    places[row_of[examples]] = examples
                    blocks.append(run.read().arranged(places, size))
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
        self.folder.mkdir(parents=True, exist_ok=True)
        blocks: list[Any] = [block for _, _, block in self._waiting]
        block = type(blocks[0]).cat(blocks)
        path = self.folder / f"{len(self._runs):05d}.safetensors"
        indices = torch.cat([indices for indices, _, _ in self._waiting])
        when = torch.cat([when for _, when, _ in self._waiting])
        self._runs.append(_Run(path, KINDS[type(block)], indices, when, write_tensors(path, encode(block))))
        self._waiting, self._waiting_bytes = [], 0


@dataclass(frozen=True)
class _Run:
    """A file of gradients or texts in the order in which they came.

    Attributes:
        path: the file.
        kind: "words", "linear" or "texts".
        indices: (n_examples,) the places of its examples in the data set.
        when: (n_examples,) the training batches in which they came.
        checksum: of the file.
    """

    path: Path
    kind: str
    indices: Tensor
    when: Tensor
    checksum: str

    def read(self) -> Any:
        """The block that was written."""
        tensors, _ = read_tensors(self.path, self.checksum)
        return decode(self.kind, tensors, slice(None), len(self.indices))
