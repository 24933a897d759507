"""Fits that end with the same weights, bit for bit: what was built for them depends on no indices, or on no seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_tracin.retraining.folder import Retraining
from lightning_tracin.retraining.outcomes import Outcome
from lightning_tracin.storage.files import hash_of_tensors


class DistinctFits:
    """Compares each fit with all before it.

    Weights are compared, not losses: those of a few test examples can be the same by chance, or all 0.
    """

    def __init__(self) -> None:
        self._by_weights: dict[str, list[Retraining]] = defaultdict(list)
        self._is_told = False

    def add(self, retraining: Retraining, outcome: Outcome) -> Retraining | None:
        """Compare a fit, and warn, once, if it is the same as one on its training examples with another seed.

        Returns:
            A fit on other training examples that is the same; None if there is none.
        """
        if outcome.weights is None:  # of a file of an earlier version
            return None
        same = self._by_weights[outcome.weights]
        others = [each for each in same if not torch.equal(each.kept, retraining.kept)]
        seeds = sorted({retraining.seed, *(each.seed for each in same)})
        if not any(each.key == retraining.key for each in same):
            same.append(retraining)
        if not others and len(seeds) > 1 and not self._is_told:
            self._is_told = True
            rank_zero_warn(
                f"Two retrainings on the same {int(retraining.kept.sum())} training examples, with the seeds "
                f"{seeds[0]} and {seeds[1]}, ended with the very same weights: what build(indices, seed) makes does "
                "not depend on its seed. Then intervals over seeds tell nothing of chance. If build seeds the random "
                "numbers itself (seed_everything), leave that out; if nothing in a fit is drawn at random, one seed "
                "tells all that can be known.",
                category=UserWarning,
            )
        return others[0] if others else None


def hash_of_weights(module: nn.Module) -> str:
    """A hash of all of a module's parameters."""
    return hash_of_tensors({name: each.detach() for name, each in module.named_parameters()})


def notes_of_seeds(outcomes: Sequence[Outcome]) -> list[str]:
    """That seeds changed nothing, of fits on the same training examples with different seeds."""
    known = [each.weights for each in outcomes if each.weights is not None]
    if len(set(known)) == len(known):
        return []
    return ["Fits with different seeds are the same, bit for bit: intervals over seeds tell nothing of chance."]
