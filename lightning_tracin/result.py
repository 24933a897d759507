"""InfluenceResult: the scores, the strongest examples, and the words behind them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console, ConsoleOptions, RenderResult
from safetensors import safe_open
from torch import Tensor

from lightning_tracin.gradients import Texts, WordGradients
from lightning_tracin.methods import Method, TracInWE, method_from_json, method_to_json
from lightning_tracin.report.tables import Example, Influential, influence_tables
from lightning_tracin.store import write_tensors
from lightning_tracin.trace import Checkpoint, Trace

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
_WORD_TENSORS = ("examples", "tokens", "norms", "directions")
_PRINTED_TESTS = 3
_PRINTED_K = 3


class TopK(NamedTuple):
    """The strongest training examples of each test example, both (n_test, k), strongest first."""

    values: Tensor
    indices: Tensor


@dataclass(repr=False, eq=False)
class InfluenceResult:
    """How much each training example pushed the model's loss on each test example.

    A positive score belongs to a proponent (training on it lowered the test example's loss), a negative one to an
    opponent. Training examples are numbered by their index in the training data set. ``print(result)`` shows a table.

    Attributes:
        method: what the scores are.
        n_train: number of training examples.
        test_indices: (n_test,) the index in the test data set of each row, ascending.
        scores: (n_test, n_train) float32, or None if only the k strongest were kept.
    """

    method: Method
    n_train: int
    test_indices: Tensor
    test_texts: Texts
    test_gradients: list[WordGradients]
    words_of_ids: dict[int, str]
    label_names: dict[int, str]
    trace: Trace | None
    checkpoint_ids: list[str]
    scores: Tensor | None = None
    strongest_proponents: TopK | None = None
    strongest_opponents: TopK | None = None

    def __repr__(self) -> str:
        kept = "" if self.strongest_proponents is None else f", k={self.strongest_proponents.values.shape[1]}"
        return f"InfluenceResult(n_test={len(self.test_indices)}, n_train={self.n_train}{kept}, method={self.method})"

    def __str__(self) -> str:
        console = Console()
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = min(_PRINTED_TESTS, len(self.test_indices))
        for row in range(shown):
            yield from self._tables(row, _PRINTED_K)
        left = len(self.test_indices) - shown
        if left:
            last = len(self.test_indices) - 1
            yield f"... and {left} more test example{'s' * (left > 1)}: result.show(index), index up to {last}"

    def show(self, test_index: int, k: int = 5, *, console: Console | None = None) -> None:
        """Print one test example with its k strongest proponents and opponents.

        Args:
            test_index: row of the scores.
            k: how many of each.
            console: where to print; the terminal by default.

        Raises:
            IndexError: if there is no such test example.
        """
        self._check_test_index(test_index)
        console = console or Console()
        for table in self._tables(test_index, k):
            console.print(table)

    def proponents(self, k: int) -> TopK:
        """The k training examples of largest score for each test example.

        Args:
            k: how many; clipped, with a warning, to the number of training examples.

        Returns:
            Values and indices in the training data set, each (n_test, k), largest first.

        Raises:
            ValueError: if fewer than k were kept.
        """
        return self._strongest(k, self.strongest_proponents, largest=True)

    def opponents(self, k: int) -> TopK:
        """The k training examples of smallest (most negative) score for each test example.

        Args:
            k: how many; clipped, with a warning, to the number of training examples.

        Returns:
            Values and indices in the training data set, each (n_test, k), smallest first.

        Raises:
            ValueError: if fewer than k were kept.
        """
        return self._strongest(k, self.strongest_opponents, largest=False)

    def words(self, test_index: int, train_index: int) -> list[tuple[str, float]]:
        """The term of each shared word in a pair's score (Yeh et al. 2022, section 4).

        The terms of different token ids that print alike (or of one word that occurs twice, which has one id) are one
        entry each; they add up to the pair's score.

        Args:
            test_index: row of the scores.
            train_index: index in the training data set.

        Returns:
            (word, term), strongest magnitude first.

        Raises:
            ValueError: if the method is not TracIn-WE.
            FileNotFoundError: if the trace that the scores were computed from is gone.
        """
        terms = self._terms(test_index, int(train_index))
        named = [(self._word(token), term) for token, term in terms.items()]
        return sorted(named, key=lambda word: -abs(word[1]))

    def aggregate(self, how: Literal["mean", "rank", "vote"] = "mean", k: int | None = None) -> Tensor:
        """One value for each training example over all test examples; high for those that help most.

        Args:
            how: "mean" of the scores; mean "rank" (0 for a test example's strongest opponent, n_train - 1 for its
                strongest proponent); or "vote", -Σ max(k - rank, 0): only a test example's k strongest opponents get
                negative votes (arXiv 2511.04715).
            k: for "vote" only, 10 by default.

        Returns:
            (n_train,) float32.

        Raises:
            ValueError: if it needs all scores and only the k strongest were kept.
        """
        if how not in ("mean", "rank", "vote"):
            raise ValueError(f"how must be 'mean', 'rank' or 'vote', but got {how!r}.")
        if how != "vote":
            if k is not None:
                raise ValueError(f'k goes with aggregate("vote"), not with {how!r}.')
            if self.scores is None:
                raise ValueError(f"aggregate({how!r}) needs all scores: call influence without k.")
            if how == "mean":
                return self.scores.mean(0)
            return self.scores.argsort(stable=True, dim=1).argsort(1).float().mean(0)
        opponents = self.opponents(min(10, self.n_train) if k is None else k)
        n_votes = opponents.indices.shape[1]
        votes = torch.arange(n_votes, 0, -1).float().expand(opponents.indices.shape)
        return -torch.zeros(self.n_train, dtype=torch.float32).index_add_(
            0, opponents.indices.flatten(), votes.flatten()
        )

    def to_pandas(self, k: int = 10) -> pd.DataFrame:
        """The k strongest proponents and opponents of each test example, a row each.

        Returns:
            Columns ``test_index`` (row of the scores), ``role`` ("proponent" or "opponent"), ``rank`` (from 1),
            ``train_index``, ``score``, and ``label`` and ``text`` of the training example as far as they are known.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_pandas needs pandas: pip install lightning-tracin[pandas]") from error
        k = min(k, self._n_kept())
        rows = []
        for role, top in (("proponent", self.proponents(k)), ("opponent", self.opponents(k))):
            for test_index in range(len(self.test_indices)):
                for rank in range(k):
                    train_index = int(top.indices[test_index, rank])
                    example = self._train_example(train_index)
                    rows.append(
                        {
                            "test_index": test_index,
                            "role": role,
                            "rank": rank + 1,
                            "train_index": train_index,
                            "score": float(top.values[test_index, rank]),
                            "label": example.label,
                            "text": example.text(),
                        }
                    )
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Write the result to one safetensors file.

        Words of a pair are read from the trace, which stays where it is; the file keeps its place, absolute and
        relative.

        Args:
            path: the file, usually ``*.safetensors``.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "test_indices": self.test_indices,
            "texts.examples": self.test_texts.examples,
            "texts.ids": self.test_texts.ids,
            "texts.labels": self.test_texts.labels,
        }
        if self.scores is not None:
            tensors["scores"] = self.scores
        for name, top in (("proponents", self.strongest_proponents), ("opponents", self.strongest_opponents)):
            if top is not None:
                tensors |= {f"{name}.values": top.values, f"{name}.indices": top.indices}
        for number, gradients in enumerate(self.test_gradients):
            tensors |= {f"gradients.{number}.{name}": getattr(gradients, name) for name in _WORD_TENSORS}
        used = set(self.test_texts.ids.tolist())
        header = {
            "version": FORMAT_VERSION,
            "method": method_to_json(self.method),
            "n_train": self.n_train,
            "n_gradients": len(self.test_gradients),
            "words_of_ids": {str(token): word for token, word in self.words_of_ids.items() if token in used},
            "label_names": {str(number): name for number, name in self.label_names.items()},
            "checkpoint_ids": self.checkpoint_ids,
            "trace": None if self.trace is None else str(self.trace.path.absolute()),
            "trace_relative": None if self.trace is None else os.path.relpath(self.trace.path, path.parent),
        }
        write_tensors(path, tensors, {"lightning_tracin.result": json.dumps(header)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> InfluenceResult:
        """Read a result that :meth:`save` wrote; its trace is opened if it is where it was.

        Raises:
            ValueError: if the file holds no result, or one of a newer version.
        """
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {}).get("lightning_tracin.result")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if content is None:
            raise ValueError(f"{path} holds no InfluenceResult.")
        header = json.loads(content)
        if header["version"] > FORMAT_VERSION:
            raise ValueError(
                f"{path} is of format version {header['version']}, but this lightning_tracin reads up to "
                f"{FORMAT_VERSION}. Update lightning_tracin."
            )
        trace = _find_trace(header, Path(path).parent)
        n_test = len(tensors["test_indices"])
        tops = [
            TopK(tensors[f"{name}.values"], tensors[f"{name}.indices"]) if f"{name}.values" in tensors else None
            for name in ("proponents", "opponents")
        ]
        words = {int(token): word for token, word in header["words_of_ids"].items()}
        method = method_from_json(header["method"])
        return cls(
            method=method,
            n_train=header["n_train"],
            test_indices=tensors["test_indices"],
            test_texts=Texts(n_test, tensors["texts.examples"], tensors["texts.ids"], tensors["texts.labels"]),
            test_gradients=[
                WordGradients(n_test, *(tensors[f"gradients.{number}.{name}"] for name in _WORD_TENSORS))
                for number in range(header["n_gradients"])
            ],
            words_of_ids=words if trace is None else {**trace.vocabulary, **words},
            label_names={int(number): name for number, name in header["label_names"].items()},
            trace=trace,
            checkpoint_ids=header["checkpoint_ids"],
            scores=tensors.get("scores"),
            strongest_proponents=tops[0],
            strongest_opponents=tops[1],
        )

    def _n_kept(self) -> int:
        return self.n_train if self.strongest_proponents is None else self.strongest_proponents.values.shape[1]

    def _strongest(self, k: int, kept: TopK | None, *, largest: bool) -> TopK:
        k = clipped_k(k, self.n_train)
        if self.scores is not None:
            return strongest(self.scores, k, largest=largest)
        assert kept is not None
        if k > kept.values.shape[1]:
            raise ValueError(f"Only the {kept.values.shape[1]} strongest were kept: call influence with k={k} or more.")
        return TopK(kept.values[:, :k], kept.indices[:, :k])

    def _check_test_index(self, test_index: int) -> None:
        if not 0 <= test_index < len(self.test_indices):
            raise IndexError(f"There are test examples 0 to {len(self.test_indices) - 1}, but got {test_index}.")

    def _terms(self, test_index: int, train_index: int) -> dict[int, float]:
        """The term of each shared token id in a pair's score."""
        self._check_test_index(test_index)
        if not 0 <= train_index < self.n_train:
            raise IndexError(f"There are training examples 0 to {self.n_train - 1}, but got {train_index}.")
        method = self.method
        if not isinstance(method, TracInWE):
            raise ValueError(f"{method} has no word terms: they are a property of the word embedding layer (TracInWE).")
        terms: dict[int, float] = defaultdict(float)
        for checkpoint, gradients in zip(self._checkpoints(), self.test_gradients, strict=True):
            moments = checkpoint.second_moments(method.name) if method.precondition == "adam" else None
            train = checkpoint.gradients(method.name).read_example(train_index)
            prepared = method.prepare(train, moments, "train")
            rate = checkpoint.learning_rate_of(method.name)
            for token, term in method.terms(gradients.slice(test_index, test_index + 1), prepared).items():
                terms[token] += rate * term
        return dict(terms)

    def _checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that the scores were computed from, if they are still there."""
        stored = {} if self.trace is None else {each.id: each for each in self.trace.checkpoints}
        if not stored.keys() >= set(self.checkpoint_ids):
            raise FileNotFoundError(
                "The trace that these scores were computed from is gone, or another fit took its place; the words of "
                "a pair and the texts of training examples are read from it."
            )
        return [stored[each] for each in self.checkpoint_ids]

    @property
    def _has_trace(self) -> bool:
        return self.trace is not None and set(self.checkpoint_ids) <= {each.id for each in self.trace.checkpoints}

    def _word(self, token: int) -> str:
        return self.words_of_ids.get(token, str(token))

    def _tables(self, test_index: int, k: int) -> list[Any]:
        """The renderables of one test example."""
        k = min(k, self._n_kept())
        proponents, opponents = self.proponents(k), self.opponents(k)
        return influence_tables(
            f"Test example {int(self.test_indices[test_index])}",
            self._example(self.test_texts, test_index),
            [self._influential(test_index, proponents, rank) for rank in range(k)],
            [self._influential(test_index, opponents, rank) for rank in range(k)],
        )

    def _influential(self, test_index: int, top: TopK, rank: int) -> Influential:
        train_index, score = int(top.indices[test_index, rank]), float(top.values[test_index, rank])
        terms = {}
        if isinstance(self.method, TracInWE) and self._has_trace:
            terms = self._terms(test_index, train_index)
        return Influential(train_index, score, self._train_example(train_index), terms)

    def _train_example(self, train_index: int) -> Example:
        if self.trace is None or not self._has_trace:
            return Example([], [], None)
        return self._example(self.trace.text(train_index), 0)

    def _example(self, texts: Texts, example: int) -> Example:
        ids = texts.ids_of(example)
        label = texts.label_of(example)
        if label is None:
            named = None
        elif label.is_integer():
            named = self.label_names.get(int(label), str(int(label)))
        else:
            named = f"{label:.3g}"
        return Example(ids, [self._word(token) for token in ids], named)


def strongest(scores: Tensor, k: int, *, largest: bool) -> TopK:
    """The k largest or smallest of each row, and where; of equal ones, those that come first."""
    least = scores.topk(k, dim=1, largest=largest).values[:, -1:]
    beyond = scores > least if largest else scores < least
    equal = scores == least
    chosen = beyond | (equal & (equal.cumsum(1) <= k - beyond.sum(1, keepdim=True)))
    indices = torch.nonzero(chosen)[:, 1].view(-1, k)  # ascending: topk alone takes any of equal scores
    order = scores.gather(1, indices).sort(dim=1, descending=largest, stable=True)
    return TopK(order.values, indices.gather(1, order.indices))


def top_of(scores: Tensor, start: int) -> tuple[TopK, TopK]:
    """A block of scores as proponents and opponents that are yet to be sorted: for :func:`merge_top`.

    Args:
        scores: (n_test, block) scores of the training examples from ``start`` on.
        start: training index of the block's first column.
    """
    block = TopK(scores, torch.arange(start, start + scores.shape[1]).expand_as(scores))
    return block, block


def merge_top(parts: Sequence[tuple[TopK, TopK]], k: int) -> tuple[TopK, TopK]:
    """The k strongest proponents and opponents of all parts; of equal ones, those of earlier parts."""
    merged = []
    for side, largest in enumerate((True, False)):
        values = torch.cat([part[side].values for part in parts], dim=1)
        best = strongest(values, min(k, values.shape[1]), largest=largest)
        indices = torch.cat([part[side].indices for part in parts], dim=1)
        merged.append(TopK(best.values, indices.gather(1, best.indices)))
    return merged[0], merged[1]


def clipped_k(k: int, n_train: int) -> int:
    """``k``, or the number of training examples where there are fewer, with a warning.

    Raises:
        ValueError: if ``k`` is under 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, but got {k}.")
    if k > n_train:
        rank_zero_warn(f"k={k} is larger than the training set: all {n_train} training examples are kept.")
    return min(k, n_train)


def _find_trace(header: dict[str, Any], folder: Path) -> Trace | None:
    """The trace that a result was computed from, if it is where it was, or lies as it did beside the result."""
    for place in (header["trace"], header["trace_relative"] and folder / header["trace_relative"]):
        if place is not None and (Path(place) / "trace.json").exists():
            trace = Trace(place)
            if set(header["checkpoint_ids"]) <= {each.id for each in trace.checkpoints}:
                return trace
    return None
