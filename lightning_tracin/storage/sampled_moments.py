"""K-FAC's second moments over a sample of the training examples: which these are, and the sums over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.kronecker import KroneckerFactors, KroneckerSums, without_bias
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.storage.checkpoint import Checkpoint, drawn_at
from lightning_tracin.storage.training_pass import NumberedExamples

#: Second moments are taken over so many training examples.
N_SAMPLED = 200


def sampled_examples(checkpoint: Checkpoint) -> list[int]:
    """The examples that second moments are taken over: of those drawn before a checkpoint 200, evenly spread."""
    drawn = drawn_at(checkpoint)
    n_sampled = min(N_SAMPLED, len(drawn))
    return drawn[torch.arange(n_sampled) * len(drawn) // max(n_sampled, 1)].tolist()


def sampling_order(checkpoint: Checkpoint, examples: NumberedExamples, processes: Processes) -> Sequence[int]:
    """The indices of this process's share of the sample, in the order in which they are read.

    Args:
        checkpoint: that the sample is of.
        examples: the training set.
        processes: those that each read a share.

    Raises:
        ValueError: if the training set is a stream, which can only be read as a whole.
    """
    require_readable_apart(examples)
    sample = sampled_examples(checkpoint)
    if examples.batches is not None:
        chosen = set(sample)
        sample = [index for batch in examples.batches for index in batch if index in chosen]
    share = processes.share(len(sample))
    return sample[share.start : share.stop]


def require_readable_apart(examples: NumberedExamples) -> None:
    """Check that a sample of the training set can be read by itself.

    Raises:
        ValueError: if it cannot.
    """
    if examples.iterable:
        raise ValueError(
            "rank takes second moments over training examples from all over the training set before gradients are "
            "stored, but this one is a stream, which is read in one order. Use a map-style data set, or no rank: K-FAC "
            "is then applied to whole gradients when influence is asked for."
        )


class SampledMoments:
    """The sums over a sample of the training examples, batch by batch, at those of some sites that have a rank.

    Args:
        sites: the sites.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = [site for site in sites if site.rank is not None]
        self._sums: defaultdict[Site, list[KroneckerSums]] = defaultdict(list)

    @property
    def is_needed(self) -> bool:
        """Whether a site has a rank."""
        return bool(self._sites)

    def add(self, captured: Captured) -> None:
        """Add a batch; examples without a finite gradient are left out."""
        captured = captured.without_gradients_of(captured.not_finite())
        for site in self._sites:
            gradients = captured.gradients[site.key]
            assert isinstance(gradients, FactorGradients)
            new = KroneckerSums.of(without_bias(gradients, site.has_bias))
            self._sums[site] = [KroneckerSums.total([*self._sums[site], new])]

    def factors(self, processes: Processes) -> dict[Site, KroneckerFactors]:
        """The second moments at each site, the same in all processes; every one of them must call it."""
        found: dict[Site, KroneckerFactors] = {}
        for site in self._sites:
            sums = [each for of_process in processes.gather(self._sums[site]) for each in of_process]
            # Another process's processor might round, or turn an eigenvector round, otherwise.
            own = KroneckerSums.total(sums).factors(site.rank) if processes.first else None
            first = processes.gather(own)[0]
            assert first is not None
            found[site] = first
        return found
