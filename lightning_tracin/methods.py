"""TracInWE and TracInLast: from gradients of test and of training examples to scores.

A method first *prepares* each side's gradients at a checkpoint (leaves words out, keeps the top words, preconditions,
normalises) and then multiplies them. Word terms are products of the same prepared rows, so they add up to the score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from operator import index
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_tracin.gradients import LinearGradients, SecondMoments, WordGradients, on_device, unit_rows
from lightning_tracin.precision import full_precision

Side: TypeAlias = Literal["test", "train"]
Normalize: TypeAlias = Literal["train", "cosine"] | None
Precondition: TypeAlias = Literal["adam"] | None

# Rows that are multiplied at once: in full precision they fit into a cache.
_PIECE = 1024
# Words that no more test rows hold are multiplied many at once.
_FEW = 8


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
        """(n_test, n_train) products of prepared blocks, on the device of the test block; the other is on the CPU."""

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
        try:
            tokens = tuple(index(token) for token in self.exclude_tokens)
        except TypeError as error:
            ids = "token ids, such as tokenizer.all_special_ids"
            raise ValueError(f"exclude_tokens must be {ids}, but got {self.exclude_tokens!r}.") from error
        object.__setattr__(self, "exclude_tokens", tokens)

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
        return words.sorted_by_token()

    def dot(self, test: WordGradients, train: WordGradients, moments: SecondMoments | None) -> Tensor:
        """(n_test, n_train) products of prepared blocks."""
        return _dot_words(test, train)

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


def without_normalizing(method: Method) -> Method:
    """The same method, whose products are not divided by norms."""
    return method_from_json({**method_to_json(method), "normalize": None})


def described(method: Method) -> str:
    """A method in words, without the long list of the tokens that it leaves out.

    Example:
        >>> described(TracInWE(normalize="cosine", exclude_tokens=range(200)))
        'TracIn-WE, cosine, without 200 tokens'
    """
    options = method_to_json(method)
    n_left_out = len(options.get("exclude_tokens", ()))
    parts = [
        {TracInWE.name: "TracIn-WE", TracInLast.name: "TracIn-Last"}[method.name],
        {"train": "normalised by the training example", "cosine": "cosine", None: ""}[method.normalize],
        "preconditioned by Adam" if method.precondition else "",
        f"{options['top_words']} top words" if options.get("top_words") else "",
        f"without {n_left_out} token{'s' * (n_left_out > 1)}" if n_left_out else "",
    ]
    return ", ".join(part for part in parts if part)


def method_from_json(content: dict[str, Any]) -> Method:
    """The method that :func:`method_to_json` wrote."""
    kind = METHODS[content["method"]]
    return kind(**{field.name: content[field.name] for field in fields(kind)})


@full_precision()
def _dot_words(test: WordGradients, train: WordGradients) -> Tensor:
    """Join two blocks, each sorted by token, on the token: (test.n_examples, train.n_examples).

    The rows of one word lie together. They are read as they are stored, a piece at a time that fits into a cache, and
    only rows that are multiplied reach the device of the test gradients.
    """
    scores = test.norms.new_zeros(train.n_examples, test.n_examples)
    shared = _shared_words(test.tokens.cpu(), train.tokens)
    few = (shared.n_test <= _FEW) & (shared.n_train <= _PIECE)
    _add_common(scores, shared.select(~few), test, train)
    _add_rare(scores, shared.select(few), test, train)
    return scores.T


def _add_common(scores: Tensor, words: _SharedWords, test: WordGradients, train: WordGradients) -> None:
    """Add the products of words that many examples hold: word by word."""
    n_test, hidden = test.n_examples, test.directions.shape[1]
    test_rows = test.directions.float() * test.factors[:, None]
    train_examples, factors = train.examples.to(scores.device), train.factors.to(scores.device)
    rows, products = scores.new_empty(_PIECE, hidden), scores.new_empty(_PIECE * n_test)
    for of_test, of_train in words.slices():
        columns, right = test.examples[of_test], test_rows[of_test]
        wide = 2 * len(columns) > n_test  # then adding whole rows of scores makes up for multiplying zeros
        if wide:
            right = scores.new_zeros(n_test, hidden).index_copy_(0, columns, right)
        for start in range(of_train.start, of_train.stop, _PIECE):
            piece = slice(start, min(start + _PIECE, of_train.stop))
            examples, n = train_examples[piece], piece.stop - piece.start
            left, out = _in_full(train.directions[piece], rows), products[: n * len(right)].view(n, -1)
            torch.mm(left, right.T, out=out).mul_(factors[piece, None])
            if wide:
                scores.index_add_(0, examples, out)
            else:
                scores.view(-1).index_add_(0, ((examples * n_test)[:, None] + columns).view(-1), out.view(-1))


def _add_rare(scores: Tensor, words: _SharedWords, test: WordGradients, train: WordGradients) -> None:
    """Add the products of words that few examples hold: many words in one batch of small matrices.

    The words of a batch have equally many test rows. Where one has fewer training rows than the others, its first one
    stands in for those that it lacks, and counts nothing.
    """
    words = words.select(torch.argsort(words.n_test * (_PIECE + 1) + words.n_train))
    batches = list(words.batches())
    n_words, _, widest = torch.tensor(batches, dtype=torch.long).view(-1, 3).T
    widths = torch.repeat_interleave(widest, n_words)
    word = torch.repeat_interleave(widths)
    number = torch.arange(len(word)) - (widths.cumsum(0) - widths)[word]
    lacks = number >= words.n_train[word]
    train_of = words.train_starts[word] + number.masked_fill_(lacks, 0)
    factors = train.factors[train_of].masked_fill_(lacks, 0)
    factors, places = factors.to(scores.device), (train.examples[train_of] * test.n_examples).to(scores.device)
    test_of = _ranges(words.test_starts, words.n_test).to(scores.device)
    left, columns = test.directions[test_of].float() * test.factors[test_of, None], test.examples[test_of]
    stored, rows = train.directions.new_empty(_PIECE, left.shape[1]), scores.new_empty(_PIECE, left.shape[1])
    of_test = of_train = 0
    for count, n_test, n_train in batches:
        tests = slice(of_test, of_test := of_test + count * n_test)
        trains = slice(of_train, of_train := of_train + count * n_train)
        n = count * n_train
        torch.index_select(train.directions, 0, train_of[trains], out=stored[:n])
        right = _in_full(stored[:n], rows).view(count, n_train, -1).transpose(1, 2)
        products = torch.bmm(left[tests].view(count, n_test, -1), right).mul_(factors[trains].view(count, 1, -1))
        where = columns[tests].view(count, -1, 1) + places[trains].view(count, 1, -1)
        scores.view(-1).index_add_(0, where.view(-1), products.view(-1))


def _in_full(directions: Tensor, rows: Tensor) -> Tensor:
    """Directions in full precision, on the device of ``rows``: themselves, or the first of ``rows``."""
    directions = directions.to(rows.device)
    return directions if directions.dtype == torch.float32 else rows[: len(directions)].copy_(directions)


@full_precision()
def _dot_linear(test: LinearGradients, train: LinearGradients) -> Tensor:
    """(test.n_examples, train.n_examples), in chunks of positions."""
    scores = test.delta_norms.new_zeros(train.n_examples, test.n_examples)
    test_inputs = test.inputs.float() * test.input_norms[:, None]
    test_deltas = test.deltas.float() * test.delta_norms[:, None]
    chunk = max(1, (1 << 24) // max(len(test.examples), 1))
    for positions in torch.split(torch.arange(len(train.examples)), chunk):
        part = on_device(train.select(positions), scores.device)
        inputs = part.inputs.float() * part.input_norms[:, None]
        deltas = part.deltas.float() * part.delta_norms[:, None]
        products = (inputs @ test_inputs.T) * (deltas @ test_deltas.T)
        by_test = scores.new_zeros(len(positions), test.n_examples).index_add_(1, test.examples, products)
        scores.index_add_(0, part.examples, by_test)
    return scores.T


@full_precision()
def _dot_weighted(test: LinearGradients, train: LinearGradients, weights: Tensor) -> Tensor:
    """(test.n_examples, train.n_examples) of Σ weights · G · G', weights (out, in); forms one G at a time."""
    scores = test.delta_norms.new_zeros(test.n_examples, train.n_examples)
    train, weights = on_device(train, scores.device), weights.to(scores.device)
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
    return replace(words, norms=words.factors * norms, directions=directions, lengths=None)


@dataclass(frozen=True)
class _SharedWords:
    """The words that two blocks, each sorted by token, share, and where either holds their rows; all (W,) int64."""

    test_starts: Tensor
    n_test: Tensor
    train_starts: Tensor
    n_train: Tensor

    def select(self, words: Tensor) -> _SharedWords:
        """Some of the words, by a mask (W,)."""
        return _SharedWords(self.test_starts[words], self.n_test[words], self.train_starts[words], self.n_train[words])

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Each word's rows on the test and on the training side."""
        numbers = torch.stack([self.test_starts, self.n_test, self.train_starts, self.n_train], 1).tolist()
        for test, n_test, train, n_train in numbers:
            yield slice(test, test + n_test), slice(train, train + n_train)

    def batches(self) -> Iterator[tuple[int, int, int]]:
        """Cut words, sorted by their numbers of rows, into batches of at most ``_PIECE`` training rows.

        Yields:
            Number of words, of each one's test rows, and of the training rows of that with the most.
        """
        n_test, n_train = self.n_test.tolist(), self.n_train.tolist()
        start = 0
        for stop in range(1, len(n_test) + 1):
            fits = stop < len(n_test) and n_test[stop] == n_test[start] and (stop + 1 - start) * n_train[stop] <= _PIECE
            if not fits:
                yield stop - start, n_test[start], n_train[stop - 1]
                start = stop


def _shared_words(test_tokens: Tensor, train_tokens: Tensor) -> _SharedWords:
    """The words that two sorted columns of tokens share."""
    unique, counts = torch.unique_consecutive(test_tokens, return_counts=True)
    train_unique, train_counts = torch.unique_consecutive(train_tokens, return_counts=True)
    _, in_test, in_train = _intersection(unique, train_unique)
    starts, train_starts = counts.cumsum(0) - counts, train_counts.cumsum(0) - train_counts
    return _SharedWords(starts[in_test], counts[in_test], train_starts[in_train], train_counts[in_train])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers from each start on, one range after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


def _intersection(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of two sorted tensors without repetitions: what both hold, and where each holds it."""
    common = a[torch.isin(a, b, assume_unique=True)]
    return common, torch.searchsorted(a, common), torch.searchsorted(b, common)


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 where an example has no gradient, or one too small to be divided by."""
    return torch.where(norms > torch.finfo(torch.float32).tiny, 1 / norms, 0.0)


def _normalizes(method: Method, side: Side) -> bool:
    return method.normalize == "cosine" or (method.normalize == "train" and side == "train")


def _check_options(method: Method) -> None:
    _require(method.normalize in (None, "train", "cosine"), "normalize", "None, 'train' or 'cosine'", method.normalize)
    _require(method.precondition in (None, "adam"), "precondition", "None or 'adam'", method.precondition)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, but got {value!r}.")
