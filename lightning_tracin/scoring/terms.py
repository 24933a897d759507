"""What a method reads of a trace: for each checkpoint and each of its summands, where and by how much it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_tracin.gradients.sites import Gradients, Site
from lightning_tracin.scoring.methods import Method, SiteMethod
from lightning_tracin.scoring.naming import recorded_site
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.second_moments import SecondMoments
from lightning_tracin.storage.shards import Shards


@dataclass(frozen=True)
class Term:
    """One summand of a method at one checkpoint.

    Attributes:
        method: prepares and multiplies gradients.
        site: where they were taken.
        weight: the site's mean learning rate since the previous checkpoint, times the summand's factor.
        moments: second moments that products are divided by, if the method asks for them.
        checkpoint: has the training examples' gradients.
    """

    method: SiteMethod
    site: Site
    weight: float
    moments: SecondMoments | None
    checkpoint: Checkpoint

    @property
    def shards(self) -> Shards:
        """The training examples' gradients."""
        return self.checkpoint.gradients(self.site)

    def prepared_tests(self, gradients: Gradients) -> Any:
        """Test gradients as they are multiplied, from those that were captured."""
        return self.method.prepare(self.site.stored(gradients), self.moments, "test")

    def prepared_training(self, stored: Gradients) -> Any:
        """Training gradients as they are multiplied, from those that were stored."""
        return self.method.prepare(stored, self.moments, "train")


def terms_at(checkpoint: Checkpoint, method: Method) -> list[Term]:
    """A method's terms at a checkpoint, one for each summand.

    Raises:
        ValueError: if the fit did not record what a summand needs; the message says what, and what to do.
    """
    found = []
    for summand in method.summands:
        own = summand.method
        site = recorded_site(own, checkpoint.sites)
        if site.top_words is not None and (getattr(own, "top_words", None) or 0) > site.top_words:
            raise ValueError(f"The trace keeps {site.top_words} words of each example; {own} asks for more.")
        if site.projection is not None and own.precondition is not None:
            sizes = " and ".join(map(str, site.projection))
            raise ValueError(
                f"The trace keeps {'word ' * site.has_words}gradients projected to {sizes} numbers, which Adam's "
                'second moments cannot be applied to. Fit without projection for precondition="adam".'
            )
        moments = checkpoint.second_moments(site) if own.precondition == "adam" else None
        found.append(Term(own, site, summand.factor * checkpoint.learning_rate_of(site), moments, checkpoint))
    return found


def sites_of(method: Method, sites: Sequence[Site]) -> list[Site]:
    """The sites that a method needs gradients at, each once.

    Raises:
        ValueError: if the fit did not record one of them.
    """
    return list(dict.fromkeys(recorded_site(summand.method, sites) for summand in method.summands))
