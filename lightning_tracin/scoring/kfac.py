"""K-FAC: gradients at a linear layer, whitened by the second moments of its inputs and of its output gradients.

Martens and Grosse 2015 (arXiv 1503.05671) approximate a layer's Fisher matrix by the Kronecker product of A = mean h h'
and G = mean δ δ'. Its inverse between two gradients is Σ_{t,t'} (h_t · A^-1 h'_t')(δ_t · G^-1 δ'_t'), the product
of gradients of which both factors are whitened; Grosse et al. 2023 (arXiv 2308.03296, section 2) take it for influence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

from torch import Tensor

from lightning_tracin.gradients.components import relative_to_largest
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.kronecker import KroneckerFactors, KroneckerSums, without_bias
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.rows import unit_rows
from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.sampled_moments import sampled_examples


@dataclass(frozen=True)
class SecondMomentsOfSample:
    """What a sample of the training examples tells of a layer.

    Attributes:
        factors: its second moments.
        positions: the mean number of positions with a gradient in an example.
    """

    factors: KroneckerFactors
    positions: float


# Blocks of test examples share what one of them has computed, for as long as any of them needs it.
_computed: WeakValueDictionary[tuple[object, ...], SecondMomentsOfSample] = WeakValueDictionary()


@dataclass(frozen=True)
class Kfac:
    """K-FAC at a site and a checkpoint; second moments are read or computed when they are first needed.

    Attributes:
        checkpoint: has the training examples' gradients.
        site: where they were taken, stored as factors or as matrices in the coordinates of the components.
        damping: see :class:`~lightning_tracin.TracInLast`, as for ``rank``.
        rank: how many components of inputs and of output gradients are kept; None for all that there are.
    """

    checkpoint: Checkpoint
    site: Site
    damping: float
    rank: tuple[int, int] | None

    def applied(self, gradients: FactorGradients | MatrixGradients) -> FactorGradients | MatrixGradients:
        """A block's gradients without the bias and whitened; of factors, in the smaller of the two forms.

        Raises:
            ValueError: if they are of another layer.
        """
        if isinstance(gradients, MatrixGradients):
            return self._scaled(gradients)
        sample, gradients = self._sample, without_bias(gradients, self.site.has_bias)
        self._require_widths(gradients.widths, sample.factors.widths)
        whitened = sample.factors.whitened(gradients, self.damping)
        n_inputs, n_outputs = whitened.widths
        is_wide = n_inputs * n_outputs > sample.positions * (n_inputs + n_outputs)
        return whitened if is_wide else MatrixGradients.from_factors(whitened, None)

    def weights(self) -> Tensor | None:
        """None: products of whitened gradients all count 1."""

    def _scaled(self, gradients: MatrixGradients) -> MatrixGradients:
        """Gradients in the coordinates of the components, of which each entry is scaled."""
        known = self._stored
        scales = known.deltas.scales(self.damping)[:, None] * known.inputs.scales(self.damping)
        self._require_widths(gradients.widths, (scales.numel(),))
        n_inputs, n_outputs = self.rank or scales.shape[::-1]
        relative, largest = relative_to_largest(scales[:n_outputs, :n_inputs])
        matrices = gradients.directions.view(-1, *scales.shape)[:, :n_outputs, :n_inputs].float() * relative
        lengths, directions = unit_rows(matrices.flatten(1))
        norms = (gradients.factors.double() * lengths.double() * largest).float()
        return MatrixGradients(gradients.n_examples, gradients.examples, norms, directions)

    @cached_property
    def _stored(self) -> KroneckerFactors:
        factors = self.checkpoint.gradients(self.site).factors(self.site)
        assert factors is not None
        return factors

    @cached_property
    def _sample(self) -> SecondMomentsOfSample:
        shards = self.checkpoint.gradients(self.site)
        key = (shards.folder, *shards.checksums, self.rank)
        found = _computed.get(key)
        if found is None:
            sample = without_bias(shards.read_examples(sampled_examples(self.checkpoint)), self.site.has_bias)
            if 0 in sample.widths:
                raise ValueError(f"{shards.folder} is damaged: its gradients have no inputs, but for a bias.")
            sums = KroneckerSums.of(sample)
            found = SecondMomentsOfSample(sums.factors(self.rank), sums.n_positions / sample.n_examples)
            _computed[key] = found
        return found

    def _require_widths(self, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ValueError(
                f"{self.checkpoint.path / self.site.key} holds gradients of {expected} numbers (without a bias), but "
                f"got some of {found}: one of them is of another model, or damaged."
            )
