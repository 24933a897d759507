"""Sites: the layers of a model at which gradients are taken, as values that a trace stores.

A site names the layer and the form in which gradients are stored. Capture, storage, scoring and results loop over a
list of sites, so that none of them distinguishes methods by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.kronecker import KroneckerFactors, without_bias
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients

#: The gradients that are taken at a site.
Gradients: TypeAlias = WordGradients | FactorGradients | MatrixGradients

#: The class of each kind of block on disk.
BLOCKS: dict[str, type[Ragged]] = {kind.KIND: kind for kind in (WordGradients, FactorGradients, MatrixGradients, Texts)}

#: What names the files of a site.
KEY_PATTERN = r"words|linear-[0-9]{1,4}"


@dataclass(frozen=True)
class Site:
    """A layer at which gradients are taken, and the form in which they are stored.

    Attributes:
        key: name of its files and folders: "words", or "linear-" and a number.
        name: the entry of the callback's ``methods`` that asked for it.
        layer: dotted name of the layer.
        shape: the form of an example's gradient: "words", one row for each word; "factors", two vectors for each
            position; "matrix", one matrix.
        is_last: whether the layer is the only linear one that feeds the loss directly.
        top_words: number of words of largest gradient norm that are stored of each example; None for all.
        projection: sizes of a random projection: (p,) for a word's gradient, (a, b) for a matrix; None for no
            projection.
        has_bias: whether a linear layer's inputs have the 1 of a bias appended; None where that is not known, in traces
            of earlier versions.
        rank: how many of K-FAC's components of the inputs and of the output gradients a matrix is of, without the bias
            (all where there are fewer); None where the whole gradient is stored.

    Raises:
        ValueError: if the key, the number of top words, the projection or the rank is not of this form.
    """

    key: str
    name: str
    layer: str
    shape: Literal["words", "factors", "matrix"]
    is_last: bool = False
    top_words: int | None = None
    projection: tuple[int, ...] | None = None
    has_bias: bool | None = None
    rank: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        projection = None if self.projection is None else tuple(self.projection)
        object.__setattr__(self, "projection", projection)
        object.__setattr__(self, "rank", None if self.rank is None else tuple(self.rank))
        sizes = {"words": (0, 1), "factors": (0,), "matrix": (0, 2)}.get(self.shape, ())
        numbers = [*(projection or ()), *(self.rank or ()), *([] if self.top_words is None else [self.top_words])]
        if (
            not re.fullmatch(KEY_PATTERN, self.key)
            or (self.key == "words") != self.has_words
            or (self.is_last and self.has_words)
            or len(projection or ()) not in sizes
            or (self.rank is not None and (self.shape != "matrix" or len(self.rank) != 2 or projection is not None))
            or not all(1 <= number < 2**31 for number in numbers)
        ):
            raise ValueError(f"{asdict(self)} is no site.")

    @property
    def has_words(self) -> bool:
        """Whether it is the word embedding table, at which scores are sums over words."""
        return self.shape == "words"

    def stored(self, gradients: Gradients, factors: KroneckerFactors | None = None) -> Gradients:
        """The gradients in this site's form, in full precision: top words, projection and rank are applied.

        Both the test and the training side of a product take this form.

        Args:
            gradients: as they were captured.
            factors: the checkpoint's, where the site has a rank.
        """
        if isinstance(gradients, WordGradients):
            if self.top_words is not None:
                gradients = gradients.top_words(self.top_words)
            return gradients if self.projection is None else gradients.projected(self.projection[0])
        if isinstance(gradients, FactorGradients) and self.rank is not None:
            assert factors is not None
            return factors.projected(without_bias(gradients, self.has_bias))
        if isinstance(gradients, FactorGradients) and self.shape == "matrix":
            sizes = None if self.projection is None else (self.projection[0], self.projection[1])
            return MatrixGradients.from_factors(gradients, sizes)
        return gradients


def words_site(sites: Sequence[Site]) -> Site | None:
    """The site at the word embedding table; None if it was not recorded."""
    return next((site for site in sites if site.has_words), None)


def last_site(sites: Sequence[Site]) -> Site | None:
    """The site at the only linear layer that feeds the loss directly; None if it was not recorded."""
    return next((site for site in sites if site.is_last), None)
