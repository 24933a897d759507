"""The terms of a score: for each checkpoint and each summand of a method, the site, the weight and the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.sites import Gradients, Site
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.scoring.methods import Method, Side, SiteMethod, Weights
from lightning_tracin.scoring.naming import recorded_site
from lightning_tracin.scoring.residuals import mean_residual_at, residual_site
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.second_moments import SecondMoments, moments_file
from lightning_tracin.storage.shards import Shards


@dataclass(frozen=True)
class Term:
    """One summand of a method at one checkpoint.

    Attributes:
        method: the method that prepares and multiplies gradients.
        site: the site at which gradients were taken.
        factor: of the summand; None where the scale that it is divided by is yet to be measured.
        moments: the second moments that precondition products; None without preconditioning.
        checkpoint: the checkpoint with the training examples' gradients.
    """

    method: SiteMethod
    site: Site
    factor: float | None
    moments: SecondMoments | None
    checkpoint: Checkpoint

    @cached_property
    def weight(self) -> float:
        """What products count: how the checkpoint counts, multiplied by the summand's factor.

        Raises:
            FileNotFoundError: as :func:`checkpoint_weight`.
            ValueError: as :func:`checkpoint_weight`, or if the factor is yet to be measured.
        """
        if self.factor is None:
            raise ValueError(
                f"What the scores of {self.method} are divided by in their sum is yet to be measured: use the method "
                "of a result, which has it, or pass TracInSum(..., scales=...)."
            )
        return self.factor * checkpoint_weight(self.method.weights, self.checkpoint, self.site)

    @property
    def shards(self) -> Shards:
        """The training examples' stored gradients."""
        return self.checkpoint.gradients(self.site)

    def prepared_tests(self, gradients: Gradients) -> Any:
        """Captured test gradients, prepared for multiplication."""
        return self.prepared(self.site.stored(gradients), "test")

    def prepared_training(self, stored: Gradients) -> Any:
        """Stored training gradients, prepared for multiplication."""
        return self.prepared(stored, "train")

    def prepared(self, gradients: Gradients, side: Side) -> Any:
        """Gradients in the form of the site, prepared for multiplication.

        Raises:
            ValueError: if the stored second moments are of another layer.
        """
        if self.moments is not None:
            widths, shape = gradients.widths, tuple(self.moments.values.shape)
            if isinstance(gradients, WordGradients):
                fits = widths == shape[1:]
            elif isinstance(gradients, MatrixGradients):
                fits = widths == (shape[0] * shape[1],)
            else:
                fits = widths == shape[::-1]
            if not fits:
                path = self.checkpoint.path / moments_file(self.site)
                raise ValueError(f"{path} is damaged: {shape} second moments are not those of gradients of {widths}.")
        return self.method.prepare(gradients, self.moments, side)

    def dot(self, test: Any, train: Any) -> Tensor:
        """(n_test, n_train) products of prepared blocks with the weight of the term.

        Raises:
            ValueError: as :meth:`require_same_layer`.
        """
        self.require_same_layer(test, train)
        return self.weight * self.method.dot(test, train, self.moments)

    def require_same_layer(self, test: Any, train: Any) -> None:
        """Check that stored gradients are of the layer that those of the test examples are of.

        Raises:
            ValueError: if they are not, so that they cannot be multiplied.
        """
        if test.widths != train.widths:
            raise ValueError(
                f"{self.checkpoint.path / self.site.key} holds gradients of {train.widths} numbers, but those of the "
                f"test examples have {test.widths}: one of them is of another model, or damaged."
            )


def terms_at(checkpoint: Checkpoint, method: Method) -> list[Term]:
    """A method's terms at a checkpoint, one for each summand.

    Raises:
        ValueError: if the trace lacks what a summand needs; the message says how to record it.
    """
    terms = []
    for summand in method.summands:
        site_method = summand.method
        site = stored_site(site_method, checkpoint.sites)
        moments = checkpoint.second_moments(site) if site_method.precondition == "adam" else None
        terms.append(Term(site_method, site, summand.factor, moments, checkpoint))
    return terms


def checkpoint_weight(weights: Weights, checkpoint: Checkpoint, site: Site) -> float:
    """How much a checkpoint counts in the scores at a site.

    Args:
        weights: "learning-rate", the site's mean learning rate since the checkpoint before; "equal", 1; "residual",
            the root of the training examples' mean residual.
        checkpoint: the checkpoint.
        site: where gradients are taken.

    Raises:
        FileNotFoundError: if gradients that tell residuals are not stored.
        ValueError: if the fit did not record them, or a file is damaged.
    """
    if weights == "learning-rate":
        return checkpoint.learning_rate_of(site)
    return 1.0 if weights == "equal" else math.sqrt(mean_residual_at(checkpoint))


def stored_site(method: SiteMethod, sites: Sequence[Site]) -> Site:
    """The recorded site at which a method needs gradients, where enough is stored for what the method does.

    Raises:
        ValueError: if the fit did not record it, or left out words, or projected gradients, that the method needs, or
            if nothing tells the residuals that weigh checkpoints.
    """
    site = recorded_site(method, sites)
    if method.weights == "residual":
        residual_site(sites)
    if site.top_words is not None and (getattr(method, "top_words", None) or 0) > site.top_words:
        raise ValueError(f"The trace keeps {site.top_words} words of each example; {method} asks for more.")
    if site.projection is not None and method.precondition is not None:
        sizes = " and ".join(map(str, site.projection))
        raise ValueError(
            f"The trace keeps {'word ' * site.has_words}gradients projected to {sizes} numbers, which Adam's "
            'second moments cannot be applied to. Fit without projection for precondition="adam".'
        )
    return site


def sites_of(method: Method, sites: Sequence[Site]) -> list[Site]:
    """The distinct sites at which a method needs gradients.

    Args:
        method: the method.
        sites: the sites that were recorded.

    Raises:
        ValueError: if the fit did not record one of them.
    """
    return list(dict.fromkeys(recorded_site(summand.method, sites) for summand in method.summands))


def training_sites_of(method: Method, sites: Sequence[Site]) -> list[Site]:
    """The distinct sites at which a method needs gradients of the training examples: also those that tell residuals.

    Args:
        method: the method.
        sites: the sites that were recorded.

    Raises:
        ValueError: if the fit did not record one of them.
    """
    weighing = [residual_site(sites) for summand in method.summands if summand.method.weights == "residual"]
    if isinstance(method, TracInRidge) and method.residual:
        weighing.append(residual_site(sites))
    return list(dict.fromkeys([*sites_of(method, sites), *weighing]))
