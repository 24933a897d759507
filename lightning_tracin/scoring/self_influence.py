"""Every training example's influence on itself, from stored gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.terms import terms_at
from lightning_tracin.storage.checkpoint import Checkpoint


def self_influences(checkpoints: Sequence[Checkpoint], method: Method, processes: Processes = ALONE) -> Tensor:
    """Every training example's influence on itself, from stored gradients, shard by shard.

    Args:
        checkpoints: those that have the method's gradients, at least one.
        method: what scores are.
        processes: those that each read their share of the shards.

    Returns:
        (n_train,) float32.
    """
    terms = [term for checkpoint in checkpoints for term in terms_at(checkpoint, method)]
    scores = torch.zeros(terms[0].shards.n_examples, dtype=torch.float32)
    for term in terms:
        shards = term.shards
        for shard in processes.share(len(shards)):
            block = shards.read(shard)
            as_test, as_training = (term.method.prepare(block, term.moments, side) for side in ("test", "train"))
            norms = [term.method.norms(prepared, term.moments) for prepared in (as_test, as_training)]
            scores[slice(*shards.bounds(shard))] += term.weight * norms[0] * norms[1]
    return torch.stack(processes.gather(scores)).sum(0)
