"""Kernels of all training examples with each other, factorised: what a dual ridge solves by at a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from rich.filesize import decimal
from torch import Tensor

from lightning_tracin.gradients.rows import DTYPES
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.scoring.free_memory import free_memory
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.residuals import residuals_at
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.scoring.ridge_solvers import Landmarks, Solver, WholeKernel
from lightning_tracin.scoring.score import PreparedTests, score
from lightning_tracin.scoring.terms import Term, terms_at
from lightning_tracin.storage.checkpoint import Checkpoint, drawn_at
from lightning_tracin.storage.scratch import Scratch

# Of the gradients, in float32, of training examples that are compared with all others at once, and of their products:
# of these as much as a quarter of the kernel, which is told, too, and has copies of them beside it while it is made.
_ROWS_BYTES, _LEAST_PRODUCTS_BYTES = 64 * 2**20, 16 * 2**20

# A kernel and its factor, or the columns at landmarks and their products; and of landmarks alone, in float64.
_BYTES_PER_PAIR, _BYTES_PER_LANDMARKS = 8, 32


@dataclass(frozen=True)
class Dual:
    """A ridge regression at one checkpoint, ready to be solved.

    Attributes:
        drawn: (n,) int64, the training examples that training drew before the checkpoint.
        terms: of the kernel, with weights that add up to 1.
        importances: (n,) float32, w residual ** power: what the solution of each drawn example is multiplied by; in the
            first process, empty in the others.
        solver: what solves it, in the first process; None in the others.
    """

    drawn: Tensor
    terms: Sequence[Term]
    importances: Tensor
    solver: Solver | None


class Kernels:
    """The factorised kernels at the checkpoints of one query.

    Args:
        method: asks for them.
        processes: share the products; every one of them must ask alike. The first one factorises.
        device: what multiplies gradients.
        keep: whether a checkpoint is asked for again, by another block of test examples: then its factor lies in a
            temporary file in between.
    """

    def __init__(self, method: TracInRidge, processes: Processes, device: torch.device, *, keep: bool) -> None:
        self.method = method
        self.processes = processes
        self.device = device
        self._scratch = Scratch() if keep else None
        self._kept: dict[str, Dual | None] = {}

    def at(self, checkpoint: Checkpoint) -> Dual | None:
        """The regression at a checkpoint; None where it has no training examples, or does not count.

        Raises:
            ValueError: if the kernel cannot be factorised, or a file of the trace is damaged.
        """
        if checkpoint.id in self._kept:
            return self._kept[checkpoint.id]
        dual = self._dual(checkpoint)
        if self._scratch is not None:
            if dual is not None and dual.solver is not None:
                dual = replace(dual, solver=dual.solver.kept(self._scratch))
            self._kept[checkpoint.id] = dual
        return dual

    def _dual(self, checkpoint: Checkpoint) -> Dual | None:
        terms, drawn = terms_at(checkpoint, self.method), drawn_at(checkpoint)
        weight = sum(term.weight for term in terms)
        if not len(drawn) or weight == 0:
            return None
        terms = [replace(term, factor=term.factor / weight) for term in terms if term.factor is not None]
        shift = self.method.alpha * len(drawn)
        n_landmarks = self.method.landmarks
        solver: Solver | None = None
        if n_landmarks is None or n_landmarks >= len(drawn):
            kernel = self._rows(terms, drawn, drawn)
            solver = None if kernel is None else WholeKernel.of(kernel, shift)
        else:
            # Drawn at random, and the same in every process and at every query.
            places = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[:n_landmarks].sort().values
            rows = self._rows(terms, drawn[places], drawn)
            solver = None if rows is None else Landmarks.of(rows.T, places, shift)
        importances = weight * self._damped_residuals(checkpoint)[drawn] if self.processes.first else torch.empty(0)
        return Dual(drawn, terms, importances, solver)

    def _damped_residuals(self, checkpoint: Checkpoint) -> Tensor:
        """(n_train,) residual ** power; without a power they need not be recorded."""
        if not self.method.residual:
            return torch.ones(checkpoint.header.n_train)
        return residuals_at(checkpoint) ** self.method.residual

    def _rows(self, terms: Sequence[Term], examples: Tensor, drawn: Tensor) -> Tensor | None:
        """(n_examples, n) float32 products of training examples with all that were drawn; in the first process."""
        products = torch.empty(len(examples), len(drawn)) if self.processes.first else None
        start = 0
        for chunk in torch.split(examples, _rows_at_once(terms, len(examples))):
            gradients = [term.prepared(term.shards.read_examples(chunk.tolist()), "test") for term in terms]
            rows = score(PreparedTests(chunk, terms, gradients), None, self.processes, self.device).scores
            assert rows is not None
            if products is not None:
                torch.index_select(rows, 1, drawn, out=products[start : start + len(chunk)])
            start += len(chunk)
        return products


def kernels_of(method: Method, processes: Processes, device: torch.device, *, keep: bool) -> Kernels | None:
    """The kernels of a method that is a ridge; None for others."""
    return Kernels(method, processes, device, keep=keep) if isinstance(method, TracInRidge) else None


def require_kernels(method: Method, checkpoints: Sequence[Checkpoint], processes: Processes) -> None:
    """As :func:`require_memory`, in the first process, if a method is a ridge; a kernel is of one checkpoint."""
    if isinstance(method, TracInRidge) and processes.first:
        require_memory(method, max((len(drawn_at(checkpoint)) for checkpoint in checkpoints), default=0))


def require_memory(method: TracInRidge, n_train: int) -> None:
    """Say what memory a kernel takes, and check that there is as much.

    Args:
        method: says how much of it is needed.
        n_train: the number of training examples.

    Raises:
        ValueError: if there is not; the message says what to do.
    """
    columns = n_train if method.landmarks is None else min(method.landmarks, n_train)
    needed, free = _BYTES_PER_PAIR * n_train * columns, free_memory()
    if columns < n_train:
        needed += _BYTES_PER_LANDMARKS * columns**2
    if free is not None and needed > free:
        fitting = _landmarks_in(0.9 * free, n_train)
        fewer = (
            f"Approximate it by some of the examples, TracInRidge(..., landmarks={fitting}), ask" if fitting else "Ask"
        )
        raise ValueError(
            f"TracInRidge compares {n_train:,} training examples with {columns:,}, which takes {decimal(needed)} of "
            f"memory, but {decimal(free)} are free. {fewer} by the method inside it, or fit on fewer examples."
        )
    of = "" if free is None else f", of {decimal(free)} that are free"
    by = "" if columns == n_train else f" by {columns:,} landmarks"
    rank_zero_info(
        f"TracInRidge: the kernel of {n_train:,} training examples{by} takes {decimal(needed)} of memory{of}."
    )


def _landmarks_in(free: float, n_train: int) -> int:
    """The largest number of landmarks that so many bytes hold: the root of what :func:`require_memory` needs."""
    linear = _BYTES_PER_PAIR * n_train
    return int((math.sqrt(linear**2 + 4 * _BYTES_PER_LANDMARKS * free) - linear) / (2 * _BYTES_PER_LANDMARKS))


def _rows_at_once(terms: Sequence[Term], n_rows: int) -> int:
    """How many of so many training examples are compared with all others at once."""
    header = terms[0].checkpoint.header
    stored = sum(term.shards.nbytes for term in terms) / header.n_train
    by_gradients = _ROWS_BYTES / max(1.0, stored * 4 / DTYPES[header.dtype].itemsize)
    by_products = max(_LEAST_PRODUCTS_BYTES / (4 * header.n_train), n_rows / 4)
    return max(1, int(min(by_gradients, by_products)))
