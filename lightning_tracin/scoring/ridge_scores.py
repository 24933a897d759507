"""Scores by a dual ridge: of test examples, and of training examples on themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.scoring.kernels import Kernels, require_kernels
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.scoring.score import PreparedTests, Scores, score, self_influences
from lightning_tracin.scoring.strongest import top_of
from lightning_tracin.storage.checkpoint import Checkpoint, ever_drawn


def ridge_scores(tests: PreparedTests, k: int | None, kernels: Kernels) -> Scores:
    """As :func:`score`, by a dual ridge: all training examples on some test examples.

    Args:
        tests: the test examples.
        k: keep only the k strongest proponents and opponents of each test example; None keeps all scores.
        kernels: the regressions at the checkpoints.

    Raises:
        ValueError: if a kernel cannot be factorised, or a file of the trace is damaged.
    """
    checkpoints = list({term.checkpoint.id: term.checkpoint for term in tests.terms}.values())
    total = torch.zeros(len(tests.indices), checkpoints[0].header.n_train)
    for checkpoint, gradients in _by_checkpoint(tests):
        dual = kernels.at(checkpoint)
        if dual is None:
            continue
        of_tests = PreparedTests(tests.indices, dual.terms, gradients)
        products = score(of_tests, None, kernels.processes, kernels.device).scores
        if dual.solver is not None:
            assert products is not None
            solved = dual.solver.solved(products[:, dual.drawn].T).T
            total[:, dual.drawn] += solved * dual.importances
    total = kernels.processes.gather(total if kernels.processes.first else None)[0]
    totals = torch.stack([total.clamp(min=0).sum(1), total.clamp(max=0).sum(1)], 1).double()
    if k is None:
        return Scores(totals, total)
    drawn = ever_drawn(checkpoints)
    examples = torch.arange(total.shape[1]) if drawn is None else torch.nonzero(drawn)[:, 0]
    return Scores(totals, None, *top_of(total[:, examples], examples, k))


def self_influence_of(checkpoints: Sequence[Checkpoint], method: Method, processes: Processes = ALONE) -> Tensor:
    """As :func:`self_influences`, also by a dual ridge.

    There it is Σ_c w_c residual_i(c) ** residual [a (U + a I)⁻¹ U]_ii, in regression known as leverage: how much an
    example says of itself that no others say for it.

    Raises:
        ValueError: as :func:`self_influences`; or if there is too little memory for a kernel.
    """
    if not isinstance(method, TracInRidge):
        return self_influences(checkpoints, method, processes)
    require_kernels(method, checkpoints, processes)
    kernels = Kernels(method, processes, torch.device("cpu"), keep=False)
    total = torch.zeros(checkpoints[0].header.n_train)
    for checkpoint in checkpoints:
        dual = kernels.at(checkpoint)
        if dual is not None and dual.solver is not None:
            total[dual.drawn] += dual.solver.on_themselves() * dual.importances
    found: Tensor = processes.gather(total if processes.first else None)[0]
    return found


def _by_checkpoint(tests: PreparedTests) -> Iterator[tuple[Checkpoint, list[Any]]]:
    """Each checkpoint, and the prepared gradients of its terms."""
    pairs = zip(tests.terms, tests.gradients, strict=True)
    for _, of_checkpoint in groupby(pairs, key=lambda pair: pair[0].checkpoint.id):
        terms, gradients = zip(*of_checkpoint, strict=True)
        yield terms[0].checkpoint, list(gradients)
