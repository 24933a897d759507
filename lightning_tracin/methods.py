"""TracInWE and TracInLast: from gradients of test and of training examples to scores.

A method first *prepares* each side's gradients at a checkpoint (leaves words out, keeps the top words, preconditions,
normalises) and then multiplies them. Word terms are products of the same prepared rows, so they add up to the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_tracin.gradients import LinearGradients, SecondMoments, WordGradients, unit_rows

Side: TypeAlias = Literal["test", "train"]
Normalize: TypeAlias = Literal["train", "cosine"] | None
Precondition: TypeAlias = Literal["adam"] | None

# Pairs of rows that are multiplied one by one, rather than as a matrix: bounds the temporary to some 100 MB.
_PAIRS = 1 << 16
# Words with more pairs of rows than this are worth a matrix product of their own.
_MATRIX = 256


class Method(Protocol):
    """What the influence loop asks of a method; gradients are of the method's own shape."""

    @property
    def name(self) -> str:
        """The name that it goes by in arguments and on disk."""

    @property
    def normalize(self) -> Normalize:
        """Which norms products are divided by."""

    @property
    def precondition(self) -> Precondition:
        """Which second moments products are divided by."""

    def prepare(self, gradients: Any, moments: SecondMoments | None, side: Side) -> Any:
        """The gradients of a block of examples as they are multiplied."""

    def dot(self, test: Any, train: Any, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""

    def norms(self, gradients: Any, moments: SecondMoments | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""


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

    name: ClassVar[str] = "tracin-we"
    top_words: int | None = None
    exclude_tokens: Sequence[int] = ()
    normalize: Normalize = None
    precondition: Precondition = None

    def __post_init__(self) -> None:
        _check_options(self)
        _require(self.top_words is None or self.top_words >= 1, "top_words", "None or at least 1", self.top_words)
        object.__setattr__(self, "exclude_tokens", tuple(int(token) for token in self.exclude_tokens))

    def prepare(self, words: WordGradients, moments: SecondMoments | None, side: Side) -> WordGradients:
        """The rows of a block of examples as they are multiplied, sorted by token."""
        if self.exclude_tokens:
            words = words.select(~torch.isin(words.tokens, torch.tensor(self.exclude_tokens)))
        if moments is not None:
            words = _preconditioned(words, moments)
        if self.top_words is not None:
            words = words.top_words(self.top_words)
        if _normalizes(self, side):
            words = words.scaled(_inverse(words.example_norms()))
        return words.sorted_by_token()

    def dot(self, test: WordGradients, train: WordGradients, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        return _dot_words(test, train)

    def norms(self, words: WordGradients, moments: SecondMoments | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""
        return words.example_norms()

    def terms(self, test: WordGradients, train: WordGradients) -> dict[int, float]:
        """The term of each shared token in the product of two prepared blocks of one example each."""
        tokens, of_test, of_train = _intersection(test.tokens, train.tokens)
        products = (test.directions[of_test].float() * train.directions[of_train].float()).sum(1)
        products = products.double() * test.norms[of_test].double() * train.norms[of_train].double()
        return dict(zip(tokens.tolist(), products.tolist(), strict=True))


@dataclass(frozen=True)
class TracInLast:
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

    name: ClassVar[str] = "tracin-last"
    normalize: Normalize = None
    precondition: Precondition = None

    def __post_init__(self) -> None:
        _check_options(self)

    def prepare(self, linear: LinearGradients, moments: SecondMoments | None, side: Side) -> LinearGradients:
        """The factors of a block of examples as they are multiplied."""
        return linear.scaled(_inverse(self.norms(linear, moments))) if _normalizes(self, side) else linear

    def dot(self, test: LinearGradients, train: LinearGradients, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        return _dot_linear(test, train) if moments is None else _dot_weighted(test, train, moments.weights())

    def norms(self, linear: LinearGradients, moments: SecondMoments | None) -> Tensor:
        """(n_examples,) norms of a prepared block."""
        return linear.example_norms(None if moments is None else moments.weights())


METHODS: dict[str, type[TracInWE | TracInLast]] = {"tracin-we": TracInWE, "tracin-last": TracInLast}


def method_of(method: str | Method) -> Method:
    """A method from its name, or itself.

    Raises:
        ValueError: if there is no method of that name.
    """
    if isinstance(method, (TracInWE, TracInLast)):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    raise ValueError(f"method must be one of {', '.join(METHODS)}, or a TracInWE or TracInLast, but got {method!r}.")


def method_to_json(method: Method) -> dict[str, Any]:
    """The method as JSON, for :func:`method_from_json`."""
    options: Any = method
    return {"method": method.name, **asdict(options)}


def method_from_json(content: dict[str, Any]) -> Method:
    """The method that :func:`method_to_json` wrote."""
    kind = METHODS[content["method"]]
    return kind(**{field.name: content[field.name] for field in fields(kind)})


def _dot_words(test: WordGradients, train: WordGradients) -> Tensor:
    """Join two blocks, each sorted by token, on the token: (test.n_examples, train.n_examples)."""
    scores = torch.zeros(train.n_examples, test.n_examples, dtype=torch.float32)
    test_tokens, test_starts, test_counts = _groups(test.tokens)
    train_tokens, train_starts, train_counts = _groups(train.tokens)
    _, in_test, in_train = _intersection(test_tokens, train_tokens)
    test_starts, test_counts = test_starts[in_test], test_counts[in_test]
    train_starts, train_counts = train_starts[in_train], train_counts[in_train]
    # A word that several test examples hold: one matrix product with all of them, added to whole rows of scores.
    frequent = (test_counts > 1) & (test_counts * train_counts > _MATRIX)
    for a, n_a, b, n_b in torch.stack([test_starts, test_counts, train_starts, train_counts], 1)[frequent].tolist():
        rows, columns = slice(a, a + n_a), slice(b, b + n_b)
        left = torch.zeros(test.n_examples, test.directions.shape[1], dtype=torch.float32)
        left[test.examples[rows]] = test.directions[rows].float() * test.norms[rows, None]
        right = train.directions[columns].float() * train.norms[columns, None]
        scores.index_add_(0, train.examples[columns], right @ left.T)
    # The many rare words: all their pairs of rows in a few long products.
    rare = ~frequent
    pairs = test_counts[rare] * train_counts[rare]
    of_pair = torch.repeat_interleave(torch.arange(len(pairs)), pairs)
    place = torch.arange(len(of_pair)) - (pairs.cumsum(0) - pairs)[of_pair]
    per_test = train_counts[rare][of_pair]
    left_rows = test_starts[rare][of_pair] + place // per_test
    right_rows = train_starts[rare][of_pair] + place % per_test
    flat = scores.view(-1)
    for a_rows, b_rows in zip(torch.split(left_rows, _PAIRS), torch.split(right_rows, _PAIRS), strict=True):
        products = (test.directions[a_rows].float() * train.directions[b_rows].float()).sum(1)
        products *= test.norms[a_rows] * train.norms[b_rows]
        flat.index_add_(0, train.examples[b_rows] * test.n_examples + test.examples[a_rows], products)
    return scores.T


def _dot_linear(test: LinearGradients, train: LinearGradients) -> Tensor:
    """(test.n_examples, train.n_examples), in chunks of positions."""
    scores = torch.zeros(train.n_examples, test.n_examples, dtype=torch.float32)
    test_inputs = test.inputs.float() * test.input_norms[:, None]
    test_deltas = test.deltas.float() * test.delta_norms[:, None]
    chunk = max(1, (1 << 24) // max(len(test.examples), 1))
    for positions in torch.split(torch.arange(len(train.examples)), chunk):
        inputs = train.inputs[positions].float() * train.input_norms[positions, None]
        deltas = train.deltas[positions].float() * train.delta_norms[positions, None]
        products = (inputs @ test_inputs.T) * (deltas @ test_deltas.T)
        by_test = torch.zeros(len(positions), test.n_examples, dtype=torch.float32).index_add_(
            1, test.examples, products
        )
        scores.index_add_(0, train.examples[positions], by_test)
    return scores.T


def _dot_weighted(test: LinearGradients, train: LinearGradients, weights: Tensor) -> Tensor:
    """(test.n_examples, train.n_examples) of Σ weights · G · G', weights (out, in); forms one G at a time."""
    scores = torch.zeros(test.n_examples, train.n_examples, dtype=torch.float32)
    inputs = train.inputs.float() * train.input_norms[:, None]
    deltas = train.deltas.float() * train.delta_norms[:, None]
    for example in range(test.n_examples):
        own = test.select(test.examples == example)
        gradient = (own.deltas * own.delta_norms[:, None]).T @ (own.inputs * own.input_norms[:, None])
        products = ((deltas @ (weights * gradient)) * inputs).sum(1)
        scores[example].index_add_(0, train.examples, products)
    return scores


def _preconditioned(words: WordGradients, moments: SecondMoments) -> WordGradients:
    """Rows times the root of the weights, on both sides, so that their product is weighted once."""
    factors = moments.of_tokens(words.tokens).weights().sqrt()
    norms, directions = unit_rows(words.directions.float() * factors)
    return replace(words, norms=words.norms * norms, directions=directions)


def _groups(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of sorted tokens: each once, where its rows start, and how many there are."""
    unique, counts = torch.unique_consecutive(tokens, return_counts=True)
    return unique, counts.cumsum(0) - counts, counts


def _intersection(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of two sorted tensors without repetitions: what both hold, and where each holds it."""
    common = a[torch.isin(a, b, assume_unique=True)]
    return common, torch.searchsorted(a, common), torch.searchsorted(b, common)


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 where an example has no gradient at all."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def _normalizes(method: Method, side: Side) -> bool:
    return method.normalize == "cosine" or (method.normalize == "train" and side == "train")


def _check_options(method: Method) -> None:
    _require(method.normalize in (None, "train", "cosine"), "normalize", "None, 'train' or 'cosine'", method.normalize)
    _require(method.precondition in (None, "adam"), "precondition", "None or 'adam'", method.precondition)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, but got {value!r}.")
