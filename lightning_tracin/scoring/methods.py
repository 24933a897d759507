"""TracInWE, TracInLast, TracInLayer and TracInSum: from gradients of test and of training examples to scores.

A method at one site first *prepares* the gradients of the test side and of the training side at a checkpoint (excludes
tokens, preconditions, selects top words, normalises) and then multiplies them. Word terms are products of the same
prepared rows, so they add up to the score. A sum adds the scores of several such methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_tracin.checked_numbers import (
    pair_of_whole_numbers,
    real_number,
    real_numbers,
    whole_number_or_none,
)
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.sites import Site, last_site, words_site
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.scoring.excluded_tokens import ExcludedTokens
from lightning_tracin.scoring.linear_products import dot_factors, dot_matrices, dot_weighted_factors
from lightning_tracin.scoring.preconditioners import Preconditioner
from lightning_tracin.scoring.ridge import TracInRidge
from lightning_tracin.scoring.word_products import dot_words

Side: TypeAlias = Literal["test", "train"]
Normalize: TypeAlias = Literal["train", "cosine"] | None
Precondition: TypeAlias = Literal["adam"] | None
Weights: TypeAlias = Literal["learning-rate", "equal", "residual"]
LinearPrecondition: TypeAlias = Literal["adam", "kfac"] | None
_Linear: TypeAlias = FactorGradients | MatrixGradients

_DAMPING = 0.1


class SiteMethod(Protocol):
    """The interface of a method at one site; gradients are in the form of that site."""

    @property
    def normalize(self) -> Normalize:
        """The norms that products are divided by: "train", "cosine" (both sides), or None."""

    @property
    def precondition(self) -> LinearPrecondition:
        """What gradients are preconditioned by: Adam's second moments, "adam"; "kfac", at linear layers; or None."""

    @property
    def weights(self) -> Weights:
        """How checkpoints count: by their "learning-rate", "equal", or by the "residual" of training."""

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The site at which the method needs gradients; None if it is not among those that were recorded."""

    def prepare(self, gradients: Any, by: Preconditioner | None, side: Side) -> Any:
        """The gradients of a block of examples, prepared for multiplication.

        Args:
            gradients: the block, on the CPU.
            by: what preconditions gradients at the site, if the method does.
            side: whether the block is of test or of training examples.
        """

    def dot(self, test: Any, train: Any, by: Preconditioner | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks, on the device of the test block; ``train`` is on the CPU."""

    def norms(self, gradients: Any, by: Preconditioner | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""


@dataclass(frozen=True)
class Summand:
    """A method at one site, and the factor of its scores in the sum.

    Attributes:
        method: the method.
        factor: the factor, 1 by default; None where the scale that it is divided by is yet to be measured.
    """

    method: SiteMethod
    factor: float | None = 1.0


@dataclass(frozen=True)
class TracInWE:
    """TracIn on the word embedding table (Yeh et al. 2022, arXiv 2202.11844, section 4).

    score(z, z') = Σ_i η_i Σ_{w in both} ∇_w l(z; θ_i) · ∇_w l(z'; θ_i)

    Args:
        top_words: keep only each example's k words of largest gradient norm at each checkpoint, on both sides, and
            multiply the words that both have (TracIn-WE-Topk).
        exclude_tokens: what to leave out (TracIn-WE-NoC), in any mixture: token ids; words, each of which stands for
            every token that prints as that word, case as in the vocabulary; "special", the tokenizer's special tokens;
            "common", the tokens that more than a tenth of the training examples hold. All but ids are looked up in the
            trace when influence is computed.
        normalize: "train" divides by the norm of the training example's gradient, "cosine" by both norms, at each
            checkpoint. Norms are taken after excluding tokens, preconditioning and selecting top words.
        precondition: "adam" divides each product by the root of Adam's bias-corrected second moment of that weight.
        weights: how checkpoints count, that is, what stands for η_i. "learning-rate", the mean learning rate since the
            checkpoint before; "equal", 1; "residual", the root of the mean over the training examples of 1 - p(label)
            there, from the gradients of the last layer (for other losses see
            :func:`~lightning_tracin.scoring.residuals.residuals_at`).

    Raises:
        ValueError: if an option has another value.

    Example:
        >>> TracInWE(normalize="cosine", weights="residual").weights
        'residual'
        >>> TracInWE(top_words=10, exclude_tokens=("special", "common")).exclude_tokens
        ('special', 'common')
    """

    top_words: int | None = None
    exclude_tokens: Sequence[int | str] = ()
    normalize: Normalize = None
    precondition: Precondition = None
    weights: Weights = field(default="learning-rate", kw_only=True)

    def __post_init__(self) -> None:
        _check_options(self, "adam")
        object.__setattr__(self, "top_words", whole_number_or_none("top_words", self.top_words))
        if not isinstance(self.exclude_tokens, ExcludedTokens):
            object.__setattr__(self, "exclude_tokens", ExcludedTokens(self.exclude_tokens))

    @property
    def excluded(self) -> ExcludedTokens:
        """``exclude_tokens``, with the token ids that they stand for where those have been looked up."""
        assert isinstance(self.exclude_tokens, ExcludedTokens)
        return self.exclude_tokens

    @property
    def summands(self) -> tuple[Summand, ...]:
        """The method as its only summand."""
        return (Summand(self),)

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The site at the word embedding table."""
        return words_site(sites)

    def prepare(self, words: WordGradients, by: Preconditioner | None, side: Side) -> WordGradients:
        """The rows of a block of examples, prepared for multiplication and sorted by token.

        Raises:
            ValueError: if tokens to exclude have not been looked up.
        """
        if self.excluded.ids is None:
            raise ValueError(
                f"exclude_tokens={self.exclude_tokens} names tokens that are yet to be looked up in a trace: use the "
                "method of a result, which has their ids."
            )
        if self.excluded.ids:
            words = words.without(self.excluded.ids)
        if by is not None:
            words = by.applied(words)
        if self.top_words is not None:
            words = words.top_words(self.top_words)
        if _normalizes(self, side):
            words = words.scaled(_inverse(words.example_norms()))
        return words.sorted()

    def dot(self, test: WordGradients, train: WordGradients, by: Preconditioner | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        return dot_words(test, train)

    def norms(self, words: WordGradients, by: Preconditioner | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""
        return words.example_norms()

    def terms(self, test: WordGradients, train: WordGradients) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of the words that a test example shares with training examples.

        Args:
            test: a prepared block of one example.
            train: a prepared block.

        Returns:
            For each term, the training example's place in its block (int64), the token id (int64), and the product at
            that token (float64); all of shape (n_terms,).
        """
        if not len(test.tokens):
            return train.examples[:0], train.tokens[:0], train.norms[:0].double()
        test_rows = torch.searchsorted(test.tokens, train.tokens).clamp(max=len(test.tokens) - 1)
        is_shared = (test.tokens[test_rows] == train.tokens) & (test.norms[test_rows] != 0) & (train.norms != 0)
        train_rows = torch.nonzero(is_shared)[:, 0]
        test_rows = test_rows[train_rows]
        products = (test.directions[test_rows].float() * train.directions[train_rows].float()).sum(1).double()
        products *= test.factors[test_rows].double() * train.factors[train_rows].double()
        return train.examples[train_rows], train.tokens[train_rows], products


class _AtLinearLayer:
    """The common base of the methods at a linear layer."""

    normalize: Normalize
    precondition: LinearPrecondition
    damping: float
    rank: tuple[int, int] | None
    weights: Weights

    def __post_init__(self) -> None:
        _check_options(self, "adam", "kfac")
        object.__setattr__(self, "damping", real_number("damping", self.damping, above=0))
        if self.rank is not None:
            object.__setattr__(self, "rank", pair_of_whole_numbers("rank", self.rank, "of inputs and of outputs"))
        if self.precondition != "kfac":
            _require(self.rank is None, "rank", 'None without precondition="kfac"', self.rank)
            _require(self.damping == _DAMPING, "damping", f'{_DAMPING} without precondition="kfac"', self.damping)

    @property
    def summands(self) -> tuple[Summand, ...]:
        """The method as its only summand."""
        return (Summand(self),)  # type: ignore[arg-type]

    def prepare(self, linear: _Linear, by: Preconditioner | None, side: Side) -> _Linear:
        """The gradients of a block of examples, prepared for multiplication."""
        if by is not None:
            linear = by.applied(linear)
        return linear.scaled(_inverse(self.norms(linear, by))) if _normalizes(self, side) else linear

    def dot(self, test: _Linear, train: _Linear, by: Preconditioner | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        weights = None if by is None else by.weights()
        if isinstance(test, MatrixGradients) and isinstance(train, MatrixGradients):
            return dot_matrices(test, train, weights)
        assert isinstance(test, FactorGradients)
        assert isinstance(train, FactorGradients)
        return dot_factors(test, train) if weights is None else dot_weighted_factors(test, train, weights)

    def norms(self, linear: _Linear, by: Preconditioner | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""
        weights = None if by is None else by.weights()
        if weights is None:
            return linear.example_norms()
        return linear.weighted_norms(weights) if isinstance(linear, MatrixGradients) else linear.example_norms(weights)


@dataclass(frozen=True)
class TracInLast(_AtLinearLayer):
    """TracIn on the last linear layer, weight and bias (Pruthi et al. 2020, arXiv 2002.08484).

    It is the baseline of Yeh et al. 2022, arXiv 2202.11844:

    score(z, z') = Σ_i η_i Σ_{t, t'} (h_t · h'_t' + 1) (δ_t · δ'_t'), where the 1 is the bias, if there is one; h is the
    layer's input, δ the gradient of the loss at its output, and t and t' are positions that the layer is applied to.

    Args:
        normalize: "train" divides by the norm of the training example's gradient, "cosine" by both norms, at each
            checkpoint.
        precondition: "adam" divides each product by the root of Adam's bias-corrected second moment of that weight.
            "kfac" whitens h and δ by their second moments A = mean h h' and G = mean δ δ' over the positions of 200
            training examples, at each checkpoint: h becomes (A + damping · tr(A) / n I)^(-1/2) h, n its length, and δ
            likewise. The bias is left out.
        damping: how much K-FAC adds to the eigenvalues of A and G, as a part of their mean.
        rank: how many components, those of the largest eigenvalues, K-FAC keeps of h and of δ, as in (128, 32); None
            for all.
        weights: how checkpoints count, as for :class:`TracInWE`.

    Example:
        >>> TracInLast(normalize="cosine")
        TracInLast(normalize='cosine', precondition=None, damping=0.1, rank=None, weights='learning-rate')
    """

    normalize: Normalize = None
    precondition: LinearPrecondition = None
    damping: float = _DAMPING
    rank: tuple[int, int] | None = None
    weights: Weights = field(default="learning-rate", kw_only=True)

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The site at the only linear layer that feeds the loss directly."""
        return last_site(sites)


@dataclass(frozen=True)
class TracInLayer(_AtLinearLayer):
    """TracIn on any linear or convolution layer, weight and bias (Pruthi et al. 2020, arXiv 2002.08484).

    The score has the form of :class:`TracInLast`, at another layer. A convolution is a linear layer on its unfolded
    windows.

    Args:
        name: dotted name of a layer that ``TracInCallback(methods=...)`` recorded.
        normalize: "train" divides by the norm of the training example's gradient, "cosine" by both norms, at each
            checkpoint.
        precondition: "adam" divides each product by the root of Adam's bias-corrected second moment of that weight.
            "kfac" whitens h and δ by their second moments A = mean h h' and G = mean δ δ' over the positions of 200
            training examples, at each checkpoint: h becomes (A + damping · tr(A) / n I)^(-1/2) h, n its length, and δ
            likewise. The bias is left out.
        damping: how much K-FAC adds to the eigenvalues of A and G, as a part of their mean.
        rank: how many components, those of the largest eigenvalues, K-FAC keeps of h and of δ, as in (128, 32); None
            for all.
        weights: how checkpoints count, as for :class:`TracInWE`.

    Example:
        >>> TracInLayer("model.bert.pooler.dense", precondition="kfac", rank=(128, 32)).rank
        (128, 32)
    """

    name: str
    normalize: Normalize = None
    precondition: LinearPrecondition = None
    damping: float = _DAMPING
    rank: tuple[int, int] | None = None
    weights: Weights = field(default="learning-rate", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(isinstance(self.name, str) and bool(self.name), "name", "the dotted name of a layer", self.name)

    def site_in(self, sites: Sequence[Site]) -> Site | None:
        """The site at the layer of that name."""
        return next((site for site in sites if site.layer == self.name and not site.has_words), None)


@dataclass(frozen=True)
class TracInSum:
    """The sum of the scores of several methods, each at its own site and divided by its standard deviation.

    score(z, z') = Σ_p mix_p · score_p(z, z') / scale_p. Scores of two layers, or cosines and products, may differ by
    orders of magnitude; by their deviations each part has the say that ``mix`` gives it. Word terms are those of its
    TracInWE, and add up to that part of the score.

    Args:
        parts: two or more methods, at most one of them a TracInWE. How checkpoints count is an option of each.
        mix: the factor of each method's scores; 1 by default.
        scales: what each method's scores are divided by. By default their standard deviation over all pairs of test and
            training examples, measured when influence is computed, in one more pass over the stored gradients; where
            test examples do not fit into memory at once, over the first of each loader that do. The method of a result
            has those that were measured, to be asked with again. (1, 1) sums plain scores of two parts.

    Raises:
        ValueError: if parts, mix or scales are not of this form.

    Example:
        >>> TracInSum((TracInWE(), TracInLast()), mix=(1, 0.5)).mix
        (1.0, 0.5)
    """

    parts: Sequence[TracInWE | TracInLast | TracInLayer]
    mix: Sequence[float] | None = None
    scales: Sequence[float] | None = None

    def __post_init__(self) -> None:
        kinds = (TracInWE, TracInLast, TracInLayer)
        parts = tuple(self.parts) if isinstance(self.parts, Sequence) else ()
        several = len(parts) > 1 and all(isinstance(each, kinds) for each in parts)
        wanted = "two or more of TracInWE, TracInLast and TracInLayer"
        if any(isinstance(each, type) for each in parts):
            wanted += ", not their classes, as in TracInSum((TracInWE(), TracInLast()))"
        _require(several, "parts", wanted, self.parts)
        n_words = sum(isinstance(each, TracInWE) for each in parts)
        _require(n_words < 2, "parts", "methods of which at most one is a TracInWE", self.parts)
        object.__setattr__(self, "parts", parts)
        for name, above in (("mix", None), ("scales", 0)):
            if getattr(self, name) is not None:
                numbers = real_numbers(name, getattr(self, name), above=above)
                _require(len(numbers) == len(parts), name, f"{len(parts)} numbers, one for each part", numbers)
                object.__setattr__(self, name, numbers)

    @property
    def mixed(self) -> Sequence[float]:
        """What each part counts, in its deviations."""
        return (1.0,) * len(self.parts) if self.mix is None else self.mix

    @property
    def summands(self) -> tuple[Summand, ...]:
        """The methods, each with its factor."""
        if self.scales is None:
            return tuple(Summand(method, None) for method in self.parts)
        factors = [mixed / scale for mixed, scale in zip(self.mixed, self.scales, strict=True)]
        return tuple(Summand(method, factor) for method, factor in zip(self.parts, factors, strict=True))


Method: TypeAlias = TracInWE | TracInLast | TracInLayer | TracInSum | TracInRidge


def word_part(method: Method) -> TracInWE | None:
    """The TracInWE in a method, which has word terms; None if there is none, as in a ridge."""
    summands = () if isinstance(method, TracInRidge) else method.summands
    return next((each.method for each in summands if isinstance(each.method, TracInWE)), None)


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 for norms of zero or too small for a finite inverse."""
    return torch.where(norms > torch.finfo(torch.float32).tiny, 1 / norms, 0.0)


def _normalizes(method: TracInWE | _AtLinearLayer, side: Side) -> bool:
    """Whether a method divides one side's gradients by their norms."""
    return method.normalize == "cosine" or (method.normalize == "train" and side == "train")


def _check_options(method: TracInWE | _AtLinearLayer, *preconditions: str) -> None:
    _require(method.normalize in (None, "train", "cosine"), "normalize", "None, 'train' or 'cosine'", method.normalize)
    listed = " or ".join(["None" if len(preconditions) == 1 else "None, 'adam'", repr(preconditions[-1])])
    _require(method.precondition in (None, *preconditions), "precondition", listed, method.precondition)
    known = ("learning-rate", "equal", "residual")
    _require(method.weights in known, "weights", "'learning-rate', 'equal' or 'residual'", method.weights)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, but got {value!r}.")
