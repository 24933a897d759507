"""Writing shards of examples that come in any order: they wait in runs on disk, and are sorted when all have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lightning_tracin.gradients.kronecker import KroneckerFactors
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.runs import Runs
from lightning_tracin.storage.shards import ShardWriter


class SortingWriter:
    """Takes what a :class:`~lightning_tracin.storage.shards.ShardWriter` does, from examples of any shards.

    Args:
        writer: of this process's shards, in the order of the data set.
        runs: of this process, for this writer alone.
        name: of the blocks.
        order: the indices of the examples in the order in which they are added.
    """

    def __init__(self, writer: ShardWriter, runs: Runs, name: str, order: Sequence[int]) -> None:
        self._writer = writer
        self._runs = runs
        self._name = name
        self._order = order
        self._n_examples = 0

    @property
    def factors(self) -> KroneckerFactors | None:
        """See :class:`~lightning_tracin.storage.shards.ShardWriter`."""
        return self._writer.factors

    def add(self, block: Ragged) -> None:
        """Add the next examples.

        Raises:
            OSError: if they cannot be written.
        """
        indices = torch.tensor(self._order[self._n_examples : self._n_examples + block.n_examples])
        self._runs.add(indices, {self._name: block}, 0)
        self._n_examples += block.n_examples

    def close(self, processes: Processes = ALONE, not_finite: Sequence[int] = ()) -> None:
        """Write the shards, and their index.

        Args:
            processes: those that add examples; every one of them must call it.
            not_finite: see :meth:`ShardWriter.close`.

        Raises:
            OSError: if a file could not be written.
            ValueError: if a run is not as it was written.
        """
        for block in self._runs.arranged(self._name, self._writer.shard_examples, processes):
            self._writer.add(block)
        self._writer.close(processes, not_finite)


@contextmanager
def sorting(
    writer: ShardWriter, folder: Path, n_examples: int, name: str, order: Sequence[int]
) -> Iterator[SortingWriter]:
    """A sorting writer, whose runs are removed afterwards.

    Args:
        writer: see :class:`SortingWriter`.
        folder: for temporary files of this process.
        n_examples: number of examples in the data set.
        name: see :class:`SortingWriter`.
        order: see :class:`SortingWriter`.
    """
    runs = Runs(folder / name, n_examples, dtype=writer.dtype)
    runs.clear()  # what a process that was killed has left
    try:
        yield SortingWriter(writer, runs, name, order)
    finally:
        runs.clear()
        with suppress(OSError):  # not there, or another site or process still has its own in it
            folder.rmdir()
            folder.parent.rmdir()
