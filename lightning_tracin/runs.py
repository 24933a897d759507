"""Gradients in the order in which training comes upon the examples, and how they are arranged in the data set's order.

What comes is written in *runs* of some 64 MB. When a checkpoint is due, each shard takes its examples out of every run,
so that memory does not grow with the training set.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients import Dtype, Texts
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
        self._indices: list[Tensor] = []
        self._checksums: list[str] = []
        self._waiting: list[tuple[Tensor, Block]] = []
        self._waiting_bytes = 0

    def add(self, indices: Tensor, block: Block) -> None:
        """Take some examples.

        Args:
            indices: (block.n_examples,) their places in the data set.
            block: their gradients or texts.

        Raises:
            OSError: if a run cannot be written.
        """
        block = block if isinstance(block, Texts) else block.as_dtype(self.dtype)
        self._waiting.append((indices, block))
        self._waiting_bytes += sum(tensor.nbytes for tensor in vars(block).values() if isinstance(tensor, Tensor))
        if self._waiting_bytes >= _RUN_BYTES:
            self._write()

    def arranged(self, n_examples: int, shard_examples: int) -> Iterator[Any]:
        """The blocks of the data set's shards, one after the other.

        Of an example that came several times the last record counts; one that never came has no rows.

        Args:
            n_examples: number of examples in the data set.
            shard_examples: examples in each block.
        """
        if self._waiting:
            self._write()
        for start in range(0, n_examples, shard_examples):
            size = min(shard_examples, n_examples - start)
            run_of = torch.full((size,), -1)
            row_of = torch.full((size,), -1)
            for run, indices in enumerate(self._indices):
                rows = torch.nonzero((indices >= start) & (indices < start + size))[:, 0]
                last = torch.full((size,), -1).scatter_reduce(0, indices[rows] - start, rows, "amax")
                run_of[last >= 0], row_of[last >= 0] = run, last[last >= 0]
            blocks = []
            for run in range(len(self._indices)):
                if run == 0 or bool((run_of == run).any()):  # the first also where it holds nothing: its shape counts
                    places = torch.full((len(self._indices[run]),), -1)
                    examples = torch.nonzero(run_of == run)[:, 0]
                    places[row_of[examples]] = examples
                    blocks.append(self._read(run).arranged(places, size))
            yield type(blocks[0]).union(blocks)

    def count(self, n_examples: int) -> int:
        """How many examples of the data set came at least once."""
        came = torch.zeros(n_examples, dtype=torch.bool)
        for indices in [*self._indices, *(indices for indices, _ in self._waiting)]:
            came[indices] = True
        return int(came.sum())

    def clear(self) -> None:
        """Forget what came."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._indices, self._checksums, self._waiting, self._waiting_bytes = [], [], [], 0

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        blocks: list[Any] = [block for _, block in self._waiting]
        block = type(blocks[0]).cat(blocks)
        self._kind = KINDS[type(block)]
        self._checksums.append(write_tensors(self._path(len(self._indices)), encode(block)))
        self._indices.append(torch.cat([indices for indices, _ in self._waiting]))
        self._waiting, self._waiting_bytes = [], 0

    def _read(self, run: int) -> Any:
        tensors, _ = read_tensors(self._path(run), self._checksums[run])
        return decode(self._kind, tensors, slice(None), len(self._indices[run]))

    def _path(self, run: int) -> Path:
        return self.folder / f"{run:05d}.safetensors"
