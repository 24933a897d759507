"""K-FAC: gradients at a linear layer, whitened by the second moments of its inputs and of its output gradients.

Martens and Grosse 2015 (arXiv 1503.05671) approximate a layer's Fisher matrix by the Kronecker product of A = mean h h'
and G = mean δ δ'. Its inverse between two gradients is Σ_{t,t'} (h_t · A^-1 h'_t')(δ_t · G^-1 δ'_t'), the product
of gradients of which both factors are whitened; Grosse et al. 2023 (arXiv 2308.03296, section 2) take it for influence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_tracin.gradients.components import Components
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.checkpoint import Checkpoint

#: Second moments are taken over so many training examples.
N_SAMPLED = 200


@dataclass(frozen=True)
class KroneckerFactors:
    """The second moments of a layer's inputs and output gradients, over the positions of some training examples.

    Attributes:
        inputs: the components of A = mean h h', without the bias.
        deltas: the components of G = mean δ δ'.
        positions: the mean number of positions with a gradient in an example.
    """

    inputs: Components
    deltas: Components
    positions: float

    @classmethod
    def of(cls, factors: FactorGradients, rank: tuple[int, int] | None) -> KroneckerFactors:
        """The second moments of a block of examples, of which ``rank`` (inputs, outputs) components are kept."""
        ranks = rank or (None, None)
        return cls(
            Components.of(factors.input_norms, factors.inputs, ranks[0]),
            Components.of(factors.delta_norms, factors.deltas, ranks[1]),
            len(factors.examples) / factors.n_examples,
        )


# Blocks of test examples share what one of them has computed, for as long as any of them needs it.
_computed: WeakValueDictionary[tuple[object, ...], KroneckerFactors] = WeakValueDictionary()


@dataclass(frozen=True)
class Kfac:
    """K-FAC at a site and a checkpoint; second moments are computed from stored gradients when they are first needed.

    Attributes:
        checkpoint: has the training examples' gradients.
        site: where they were taken, stored as factors.
        damping: see :class:`~lightning_tracin.TracInLast`, as for ``rank``.
        rank: how many components of inputs and of output gradients are kept; None for all.
    """

    checkpoint: Checkpoint
    site: Site
    damping: float
    rank: tuple[int, int] | None

    def applied(self, gradients: FactorGradients) -> FactorGradients | MatrixGradients:
        """A block's gradients without the bias and whitened, in the smaller of two forms: as factors or as matrices.

        Raises:
            ValueError: if they are of another layer.
        """
        known, gradients = self.factors, without_bias(gradients, self.site)
        widths = (len(known.inputs.basis), len(known.deltas.basis))
        if gradients.widths != widths:
            raise ValueError(
                f"{self.checkpoint.path / self.site.key} holds gradients of {widths} numbers (without a bias), but got "
                f"some of {gradients.widths}: one of them is of another model, or damaged."
            )
        whitened = FactorGradients(
            gradients.n_examples,
            gradients.examples,
            *known.inputs.whitened(gradients.input_norms, gradients.inputs, self.damping),
            *known.deltas.whitened(gradients.delta_norms, gradients.deltas, self.damping),
        )
        n_in, n_out = whitened.widths
        is_wide = n_in * n_out > known.positions * (n_in + n_out)
        return whitened if is_wide else MatrixGradients.from_factors(whitened, None)

    def weights(self) -> Tensor | None:
        """None: products of whitened gradients all count 1."""

    @cached_property
    def factors(self) -> KroneckerFactors:
        """The layer's second moments at the checkpoint."""
        shards = self.checkpoint.gradients(self.site)
        key = (shards.folder, *shards.checksums, self.rank)
        found = _computed.get(key)
        if found is None:
            sample = shards.read_examples(sampled_examples(self.checkpoint))
            found = KroneckerFactors.of(without_bias(sample, self.site), self.rank)
            _computed[key] = found
        return found


def without_bias(factors: FactorGradients, site: Site) -> FactorGradients:
    """Gradients of a layer's weight alone, in a view: without the 1 that a bias appends to the inputs.

    Directions of the inputs are shorter than 1 then.

    Raises:
        ValueError: if there is no input but that 1.
    """
    if not site.has_bias:
        return factors
    if factors.inputs.shape[1] < 2:
        raise ValueError(f"The gradients at {site.layer!r} are damaged: they have no input beside that of the bias.")
    return replace(factors, inputs=factors.inputs[:, :-1])


def sampled_examples(checkpoint: Checkpoint) -> list[int]:
    """The examples that second moments are taken over: of those drawn before a checkpoint 200, evenly spread."""
    drawn = checkpoint.drawn()
    n_drawn = checkpoint.header.n_train if drawn is None else int(drawn.sum())
    n_sampled = min(N_SAMPLED, n_drawn)
    places = torch.arange(n_sampled) * n_drawn // max(n_sampled, 1)
    return (places if drawn is None else torch.nonzero(drawn)[places, 0]).tolist()
