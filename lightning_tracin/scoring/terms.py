"""The terms of a score: for each checkpoint and each summand of a method, the site, the weight and the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.gradients.sites import Gradients, Site
from lightning_tracin.scoring.kfac import Kfac
from lightning_tracin.scoring.methods import Method, Side, SiteMethod, TracInLast, TracInLayer, Weights
from lightning_tracin.scoring.naming import recorded_site
from lightning_tracin.scoring.preconditioners import AdamMoments, Preconditioner
from lightning_tracin.scoring.residuals import mean_residual_at, residual_site
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.components import COMPONENTS
from lightning_tracin.storage.files import damage_named
from lightning_tracin.storage.second_moments import moments_file
from lightning_tracin.storage.shards import Shards


@dataclass(frozen=True)
class Term:
    """One summand of a method at one checkpoint.

    Attributes:
        method: the method that prepares and multiplies gradients.
        site: the site at which gradients were taken.
        factor: of the summand; None where the scale that it is divided by is yet to be measured.
        preconditioner: what preconditions gradients; None without preconditioning.
        checkpoint: the checkpoint with the training examples' gradients.
    """

    method: SiteMethod
    site: Site
    factor: float | None
    preconditioner: Preconditioner | None
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
        if self.site.rank is None:
            return self.prepared(self.site.stored(gradients), "test")
        factors = self.shards.factors(self.site)
        with damage_named(self.checkpoint.path / self.site.key / COMPONENTS):
            stored = self.site.stored(gradients, factors)
        return self.prepared(stored, "test")

    def prepared_training(self, stored: Gradients) -> Any:
        """Stored training gradients, prepared for multiplication."""
        return self.prepared(stored, "train")

    def prepared(self, gradients: Gradients, side: Side) -> Any:
        """Gradients in the form of the site, prepared for multiplication.

        Raises:
            ValueError: if what preconditions them is of another layer.
        """
        return self.method.prepare(gradients, self.preconditioner, side)

    def dot(self, test: Any, train: Any) -> Tensor:
        """(n_test, n_train) products of prepared blocks with the weight of the term.

        Raises:
            ValueError: as :meth:`require_same_layer`.
        """
        self.require_same_layer(test, train)
        return self.weight * self.method.dot(test, train, self.preconditioner)

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
        preconditioner = _preconditioner(site_method, site, checkpoint)
        terms.append(Term(site_method, site, summand.factor, preconditioner, checkpoint))
    return terms


def _preconditioner(method: SiteMethod, site: Site, checkpoint: Checkpoint) -> Preconditioner | None:
    """What a method preconditions the gradients at a site by."""
    if method.precondition == "adam":
        return AdamMoments(checkpoint.second_moments(site), checkpoint.path / moments_file(site))
    if isinstance(method, (TracInLast, TracInLayer)) and method.precondition == "kfac":
        return Kfac(checkpoint, site, method.damping, method.rank)
    return None


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


def warn_if_nothing_counts(method: Method, checkpoints: Sequence[Checkpoint]) -> None:
    """Warn if no checkpoint counts in a method's scores, because the learning rates were 0: all scores are 0 then.

    Args:
        method: what scores will be.
        checkpoints: that count.

    Raises:
        ValueError: as :func:`terms_at`.
    """
    methods = [summand.method for summand in method.summands]
    if not checkpoints or any(each.weights != "learning-rate" for each in methods):
        return
    sites = [stored_site(each, checkpoints[0].sites) for each in methods]
    if not any(checkpoint.learning_rate_of(site) for checkpoint in checkpoints for site in sites):
        layers = ", ".join(dict.fromkeys(site.layer for site in sites))
        rank_zero_warn(
            f"All scores by {method} are 0: checkpoints count by the learning rate, which was always 0 at {layers}. "
            'Use weights="equal" to count them alike.',
            category=UserWarning,
        )


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
    if method.precondition == "kfac":
        _require_factors(method, site)
    elif site.rank is not None:
        raise ValueError(
            f"The trace keeps {site.rank[0]} x {site.rank[1]} components of the gradients at {site.layer!r} (rank of "
            'TracInCallback), which are for precondition="kfac" alone. Ask for that, or fit without rank.'
        )
    elif site.projection is not None and method.precondition is not None:
        sizes = " and ".join(map(str, site.projection))
        raise ValueError(
            f"The trace keeps {'word ' * site.has_words}gradients projected to {sizes} numbers, which Adam's "
            'second moments cannot be applied to. Fit without projection for precondition="adam".'
        )
    return site


def _require_factors(method: SiteMethod, site: Site) -> None:
    """Check that a linear layer's inputs and output gradients, or enough of their components, are stored for K-FAC.

    Raises:
        ValueError: if they are not.
    """
    asked = getattr(method, "rank", None)
    if site.rank is not None:
        if asked is not None and (asked[0] > site.rank[0] or asked[1] > site.rank[1]):
            raise ValueError(f"The trace keeps {site.rank} components at {site.layer!r}; {method} asks for more.")
    elif site.shape != "factors":
        why = "" if site.projection else ", which take less space there than the factors at each position"
        raise ValueError(
            f"The trace keeps {'projected ' * bool(site.projection)}matrices at {site.layer!r}{why}; but K-FAC needs "
            "the factors, inputs and output gradients. Fit with TracInCallback(rank=(128, 32)), which keeps their "
            "components."
        )
    elif site.has_bias is None:
        raise ValueError(
            f"The trace is of an earlier version, which did not tell whether {site.layer!r} has a bias, as "
            'precondition="kfac" has to know. Take its checkpoints into a new one: Trace.from_checkpoints(path, '
            "Trace(...), model, train_dataloaders, methods=...)."
        )


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
