"""Sites: the places in a model where gradients are taken, as values that a trace can hold.

A site says which layer, and what is stored of the gradients there. Capture, storage, scoring and results go through a
list of sites; none of them asks for a method by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients

#: What can be taken at a site.
Gradients: TypeAlias = WordGradients | FactorGradients | MatrixGradients

#: What a block on disk is made of, by what it is called there.
BLOCKS: dict[str, type[Ragged]] = {kind.KIND: kind for kind in (WordGradients, FactorGradients, MatrixGradients, Texts)}

_KEY = re.compile(r"words|linear-[0-9]{1,4}")


@dataclass(frozen=True)
class Site:
    """A place where gradients are taken.

    Attributes:
        key: what its files are called.
        name: what the callback's ``methods`` asked for it by.
        layer: dotted name of the layer.
        shape: what is stored for an example: "words", a row for each word; "factors", two for each position; "matrix".
        is_last: whether it is the linear layer that alone feeds the loss.
        top_words: of words, how many of each example are stored, those of largest norm; None for all.
        projection: sizes that gradients are projected to at random: (p,) of each word's, (a, b) of a matrix; None for
            no projection.
    """

    key: str
    name: str
    layer: str
    shape: Literal["words", "factors", "matrix"]
    is_last: bool = False
    top_words: int | None = None
    projection: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        projection = None if self.projection is None else tuple(self.projection)
        object.__setattr__(self, "projection", projection)
        sizes = {"words": (0, 1), "factors": (0,), "matrix": (0, 2)}.get(self.shape, ())
        if not _KEY.fullmatch(self.key) or len(projection or ()) not in sizes:
            raise ValueError(f"{asdict(self)} is no site.")

    @property
    def has_words(self) -> bool:
        """Whether it is at the word embedding table, so that scores are sums over words."""
        return self.shape == "words"

    def stored(self, gradients: Gradients) -> Gradients:
        """Gradients as they are stored, in full precision; both sides of a product go through this."""
        if isinstance(gradients, WordGradients):
            if self.top_words is not None:
                gradients = gradients.top_words(self.top_words)
            return gradients if self.projection is None else gradients.projected(self.projection[0])
        if isinstance(gradients, FactorGradients) and self.shape == "matrix":
            sizes = None if self.projection is None else (self.projection[0], self.projection[1])
            return MatrixGradients.from_factors(gradients, sizes)
        return gradients


@dataclass(frozen=True)
class StorageOptions:
    """What is kept of gradients to save space.

    Attributes:
        dtype: what directions are stored in.
        top_words: each example's words of largest norm, so many of them; None for all.
        projection: numbers that each word's direction is projected to at random, or a pair (a, b) that the gradients
            of linear layers are projected to; None for no projection.
    """

    dtype: Dtype
    top_words: int | None = None
    projection: int | tuple[int, int] | None = None

    def applied(self, site: Site, example: Gradients) -> Site:
        """A site that stores the smallest of the shapes that these options allow.

        Args:
            site: where.
            example: gradients that were taken there, of a few examples.

        Raises:
            ValueError: if a projection would not make them smaller.
        """
        if isinstance(example, WordGradients):
            hidden = example.directions.shape[1]
            size = self.projection if isinstance(self.projection, int) else None
            if size is not None and size >= hidden:
                raise ValueError(
                    f"projection={size} saves nothing: word gradients have {hidden} numbers for each word."
                )
            return replace(site, top_words=self.top_words, projection=None if size is None else (size,))
        pair = self.projection if isinstance(self.projection, tuple) else None
        shapes = [replace(site, shape="factors"), replace(site, shape="matrix", projection=pair)]
        return min(shapes, key=lambda each: encoded_bytes(each.stored(example), self.dtype))


def encoded_bytes(block: Ragged, dtype: Dtype) -> int:
    """Bytes that a block takes on disk, but for what a file has once."""
    columns = block.as_dtype(dtype).columns.values()
    return sum(column.nbytes // 2 if column.element_size() == 8 else column.nbytes for column in columns)


def words_site(sites: Sequence[Site]) -> Site | None:
    """The site at the word embedding table, if there is one."""
    return next((site for site in sites if site.has_words), None)


def last_site(sites: Sequence[Site]) -> Site | None:
    """The site at the layer that alone feeds the loss, if it is known."""
    return next((site for site in sites if site.is_last), None)


def sites_from_json(content: Any) -> tuple[Site, ...]:
    """Sites from the dictionaries of their attributes.

    Raises:
        ValueError: if they are none, or if two have one key.
    """
    try:
        sites = tuple(Site(**each) for each in content)
    except TypeError as error:
        raise ValueError(f"{content!r} are no sites: {error}.") from error
    if len({site.key for site in sites}) < len(sites):
        raise ValueError(f"Two of {content!r} have the same key.")
    return sites
