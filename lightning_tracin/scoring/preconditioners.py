"""What preconditions gradients at a site: Adam's second moments, or the Kronecker factors of K-FAC (``kfac.py``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.rows import unit_rows
from lightning_tracin.gradients.sites import Gradients
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.storage.second_moments import SecondMoments


class Preconditioner(Protocol):
    """What a method preconditions the gradients at a site by, at a checkpoint."""

    def applied(self, gradients: Any) -> Any:
        """A block's gradients, as far preconditioned as each side of a product can be by itself.

        Raises:
            ValueError: if they are of another layer.
        """

    def weights(self) -> Tensor | None:
        """(out, in), what each product of the entries of such gradients counts at a linear layer; None for 1."""


@dataclass(frozen=True)
class AdamMoments:
    """Adam's second moments at a site: each product is divided by the root of its weight's.

    Attributes:
        moments: the second moments.
        path: their file, for messages.
    """

    moments: SecondMoments
    path: Path

    def applied(self, gradients: Gradients) -> Gradients:
        """Words multiplied by the root of the weights: with that on both sides, each product has the weight once.

        Raises:
            ValueError: if the second moments are of another layer.
        """
        widths, shape = gradients.widths, tuple(self.moments.values.shape)
        if isinstance(gradients, WordGradients):
            fits = widths == shape[1:]
        elif isinstance(gradients, MatrixGradients):
            fits = widths == (shape[0] * shape[1],)
        else:
            fits = widths == shape[::-1]
        if not fits:
            raise ValueError(f"{self.path} is damaged: {shape} second moments are not those of gradients of {widths}.")
        if not isinstance(gradients, WordGradients):
            return gradients
        factors = self.moments.of_tokens(gradients.tokens).weights().sqrt()
        norms, directions = unit_rows(gradients.directions.float() * factors)
        return replace(gradients, norms=gradients.factors * norms, directions=directions, lengths=None)

    def weights(self) -> Tensor:
        """(out, in), the factors of products: 1 / (root + eps), and 0 for weights that Adam has not updated yet."""
        return self.moments.weights()
