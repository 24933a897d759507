"""TracInWE, TracInLast, TracInLayer and TracInSum: from gradients of test and of training examples to scores.

A method at one site first *prepares* each side's gradients at a checkpoint (leaves words out, keeps the top words,
preconditions, normalises) and then multiplies them. Word terms are products of the same prepared rows, so they add up
to the score. A sum has several such methods as its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.rows import unit_rows
from lightning_tracin.gradients.sites import Site, last_site, words_site
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.scoring.linear_products import dot_factors, dot_matrices, dot_weighted_factors
from lightning_tracin.scoring.word_products import dot_words
from lightning_tracin.storage.second_moments import SecondMoments

Side: TypeAlias = Literal["test", "train"]
Normalize: TypeAlias = Literal["train", "cosine"] | None
Precondition: TypeAlias = Literal["adam"] | None
_Linear: TypeAlias = FactorGradients | MatrixGradients


class SiteMethod(Protocol):
    """What a method at one site can do; gradients are of the site's own shape."""

    @property
    def normalize(self) -> Normalize:
        """Which norms products are divided by."""

    @property
    def precondition(self) -> Precondition:
        """Which second moments products are divided by."""

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The site that gradients are needed at, among those that were recorded; None if it is not there."""

    def prepare(self, gradients: Any, moments: SecondMoments | None, side: Side) -> Any:
        """The gradients of a block of examples as they are multiplied."""

    def dot(self, test: Any, train: Any, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks, on the device of the test block; the other is on the CPU."""

    def norms(self, gradients: Any, moments: SecondMoments | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""


@dataclass(frozen=True)
class Summand:
    """A method at one site, and what its scores are multiplied with before they are added to others."""

    method: SiteMethod
    factor: float = 1.0


@dataclass(frozen=True)
class TracInWE:
    """TracIn on the word embedding table (Yeh et al. 2022, arXiv 2202.11844, section 4).

    score(z, z') = Σ_i η_i Σ_{w in both} ∇_w l(z; θ_i) · ∇_w l(z'; θ_i)

    Args:
        top_words: keep only each example's k words of largest gradient norm per checkpoint, on each side, and join
            them on the word (TracIn-WE-Topk).
        exclude_tokens: token ids to leave out, such as [CLS] and [SEP] (TracIn-WE-NoC).
        normalize: "train" divides by the norm of the training example's gradient, "cosine" by both norms, at each
            checkpoint. Norms are those of what is multiplied: after leaving out, preconditioning and top words.
        precondition: "adam" divides each product by the root of Adam's bias-corrected second moment of that weight.

    Example:
        >>> TracInWE(top_words=10, normalize="train")
        TracInWE(top_words=10, exclude_tokens=(), normalize='train', precondition=None)
    """

    top_words: int | None = None
    exclude_tokens: Sequence[int] = ()
    normalize: Normalize = None
    precondition: Precondition = None

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self.top_words is None or self.top_words >= 1, "top_words", "None or at least 1", self.top_words)
        try:
            tokens = tuple(index(token) for token in self.exclude_tokens)
        except TypeError as error:
            ids = "token ids, such as tokenizer.all_special_ids"
            raise ValueError(f"exclude_tokens must be {ids}, but got {self.exclude_tokens!r}.") from error
        object.__setattr__(self, "exclude_tokens", tokens)

    @property
    def summands(self) -> tuple[Summand, ...]:
        """The method itself."""
        return (Summand(self),)

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The word embedding table."""
        return words_site(sites)

    def prepare(self, words: WordGradients, moments: SecondMoments | None, side: Side) -> WordGradients:
        """The rows of a block of examples as they are multiplied, sorted by token."""
        if self.exclude_tokens:
            words = words.without(self.exclude_tokens)
        if moments is not None:
            words = _preconditioned(words, moments)
        if self.top_words is not None:
            words = words.top_words(self.top_words)
        if _normalizes(self, side):
            words = words.scaled(_inverse(words.example_norms()))
        return words.sorted()

    def dot(self, test: WordGradients, train: WordGradients, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        return dot_words(test, train)

    def norms(self, words: WordGradients, moments: SecondMoments | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""
        return words.example_norms()

    def terms(self, test: WordGradients, train: WordGradients) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the words that a test example shares with training examples.

        Args:
            test: a prepared block of one example.
            train: a prepared block.

        Returns:
            The place of a training example in its block, a token id, and the term of that token in the pair's product,
            float64; all (number of terms,).
        """
        if not len(test.tokens):
            return train.examples[:0], train.tokens[:0], train.norms[:0].double()
        of_test = torch.searchsorted(test.tokens, train.tokens).clamp(max=len(test.tokens) - 1)
        is_shared = (test.tokens[of_test] == train.tokens) & (test.norms[of_test] != 0) & (train.norms != 0)
        of_train = torch.nonzero(is_shared)[:, 0]
        of_test = of_test[of_train]
        products = (test.directions[of_test].float() * train.directions[of_train].float()).sum(1).double()
        products *= test.factors[of_test].double() * train.factors[of_train].double()
        return train.examples[of_train], train.tokens[of_train], products


class _AtLinearLayer:
    """What methods at a linear layer have in common."""

    normalize: Normalize
    precondition: Precondition

    @property
    def summands(self) -> tuple[Summand, ...]:
        """The method itself."""
        return (Summand(self),)  # type: ignore[arg-type]

    def prepare(self, linear: _Linear, moments: SecondMoments | None, side: Side) -> _Linear:
        """The gradients of a block of examples as they are multiplied."""
        return linear.scaled(_inverse(self.norms(linear, moments))) if _normalizes(self, side) else linear

    def dot(self, test: _Linear, train: _Linear, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        weights = None if moments is None else moments.weights()
        if isinstance(test, MatrixGradients) and isinstance(train, MatrixGradients):
            return dot_matrices(test, train, weights)
        assert isinstance(test, FactorGradients)
        assert isinstance(train, FactorGradients)
        return dot_factors(test, train) if weights is None else dot_weighted_factors(test, train, weights)

    def norms(self, linear: _Linear, moments: SecondMoments | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""
        if moments is None:
            return linear.example_norms()
        weights = moments.weights()
        return linear.weighted_norms(weights) if isinstance(linear, MatrixGradients) else linear.example_norms(weights)


@dataclass(frozen=True)
class TracInLast(_AtLinearLayer):
    """TracIn on the last linear layer, weight and bias (Pruthi et al. 2020; the baseline of Yeh et al. 2022).

    score(z, z') = Σ_i η_i Σ_{t, t'} (h_t · h'_t' + 1) (δ_t · δ'_t'), the 1 only with a bias; h is the layer's input, δ
    the loss gradient at its output, t and t' the positions that the layer is applied at.

    Args:
        normalize: "train" divides by the norm of the training example's gradient, "cosine" by both norms, at each
            checkpoint.
        precondition: "adam" divides each product by the root of Adam's bias-corrected second moment of that weight.

    Example:
        >>> TracInLast(normalize="cosine")
        TracInLast(normalize='cosine', precondition=None)
    """

    normalize: Normalize = None
    precondition: Precondition = None

    def __post_init__(self) -> None:
        _check_options(self)

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The linear layer that alone feeds the loss."""
        return last_site(sites)


@dataclass(frozen=True)
class TracInLayer(_AtLinearLayer):
    """TracIn on any linear or convolution layer, weight and bias (Pruthi et al. 2020).

    The score is that of :class:`TracInLast`, at another layer. A convolution is a linear layer on the windows that it
    slides over.

    Args:
        name: dotted name of the layer in the module, one that ``TracInCallback(methods=...)`` recorded.
        normalize: "train" divides by the norm of the training example's gradient, "cosine" by both norms, at each
            checkpoint.
        precondition: "adam" divides each product by the root of Adam's bias-corrected second moment of that weight.

    Example:
        >>> TracInLayer("model.bert.pooler.dense", normalize="cosine")
        TracInLayer(name='model.bert.pooler.dense', normalize='cosine', precondition=None)
    """

    name: str
    normalize: Normalize = None
    precondition: Precondition = None

    def __post_init__(self) -> None:
        _check_options(self)
        _require(isinstance(self.name, str) and bool(self.name), "name", "the dotted name of a layer", self.name)

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The layer of that name."""
        return next((site for site in sites if site.layer == self.name and not site.has_words), None)


@dataclass(frozen=True)
class TracInSum:
    """The sum of the scores of several methods, each at its own site.

    Word terms are those of its TracInWE: they add up to that part of the score.

    Args:
        parts: two methods or more, at most one of them a TracInWE.
        mix: what the scores of each are multiplied with; 1 by default.

    Example:
        >>> TracInSum((TracInWE(), TracInLast()), mix=(1, 0.5)).mix
        (1.0, 0.5)
    """

    parts: Sequence[TracInWE | TracInLast | TracInLayer]
    mix: Sequence[float] | None = None

    def __post_init__(self) -> None:
        kinds = (TracInWE, TracInLast, TracInLayer)
        parts = tuple(self.parts) if isinstance(self.parts, Sequence) else ()
        several = len(parts) > 1 and all(isinstance(each, kinds) for each in parts)
        _require(several, "parts", "two or more of TracInWE, TracInLast and TracInLayer", self.parts)
        n_words = sum(isinstance(each, TracInWE) for each in parts)
        _require(n_words < 2, "parts", "methods of which at most one is a TracInWE", self.parts)
        object.__setattr__(self, "parts", parts)
        if self.mix is not None:
            mix = tuple(float(factor) for factor in self.mix)
            finite = len(mix) == len(parts) and all(math.isfinite(factor) for factor in mix)
            _require(finite, "mix", f"{len(parts)} finite numbers, one for each part", self.mix)
            object.__setattr__(self, "mix", mix)

    @property
    def summands(self) -> tuple[Summand, ...]:
        """The methods, each with its factor."""
        factors = [1.0] * len(self.parts) if self.mix is None else self.mix
        return tuple(Summand(method, factor) for method, factor in zip(self.parts, factors, strict=True))


Method: TypeAlias = TracInWE | TracInLast | TracInLayer | TracInSum


def word_part(method: Method) -> tuple[TracInWE, float] | None:
    """The part of a method that has word terms, and its factor."""
    words = ((each.method, each.factor) for each in method.summands if isinstance(each.method, TracInWE))
    return next(words, None)


def _preconditioned(words: WordGradients, moments: SecondMoments) -> WordGradients:
    """Rows times the root of the weights, on both sides, so that their product is weighted once."""
    factors = moments.of_tokens(words.tokens).weights().sqrt()
    norms, directions = unit_rows(words.directions.float() * factors)
    return replace(words, norms=words.factors * norms, directions=directions, lengths=None)


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 where an example has no gradient, or one too small to be divided by."""
    return torch.where(norms > torch.finfo(torch.float32).tiny, 1 / norms, 0.0)


def _normalizes(method: TracInWE | _AtLinearLayer, side: Side) -> bool:
    return method.normalize == "cosine" or (method.normalize == "train" and side == "train")


def _check_options(method: TracInWE | _AtLinearLayer) -> None:
    _require(method.normalize in (None, "train", "cosine"), "normalize", "None, 'train' or 'cosine'", method.normalize)
    _require(method.precondition in (None, "adam"), "precondition", "None or 'adam'", method.precondition)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, but got {value!r}.")
