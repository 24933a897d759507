"""What a query found, as it is kept: in memory, and in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.gradients.printable import printable, storable
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.results.excerpt import Excerpt
from lightning_tracin.results.excerpt_file import excerpt_from, header_of, tensors_of
from lightning_tracin.results.result_file import FILE_CHECKSUM, HEADER, WORD_TENSORS, ResultHeader, read_result
from lightning_tracin.scoring.methods import Method
from lightning_tracin.scoring.naming import described, method_to_json
from lightning_tracin.scoring.strongest import TopK
from lightning_tracin.storage.files import hash_of_tensors, write_tensors
from lightning_tracin.storage.schemas import FORMAT_VERSION
from lightning_tracin.storage.trace import Trace

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(repr=False, eq=False)
class StoredResult:
    """What a result consists of, and its file.

    Attributes:
        method: what the scores are.
        n_train: number of training examples.
        test_indices: (n_test,) the index in the test data set of each row, ascending; where the test examples came in
            several loaders, in that of the row's own, ascending inside each.
        predictions: (n_test, 2) float64, what the model of the last checkpoint said of each: the class and its
            probability, or a value and NaN; NaN where it is not known.
        scores: (n_test, n_train) float32, or None if only the k strongest were kept.
        totals: (n_test, 2) float64, the sums of each test example's positive and of its negative scores.
        undrawn: (n,) int64, the indices of examples of the training data set that training never drew, such as those
            that the sampler holds back: their scores are zero, and they are neither proponents nor opponents.
        test_loaders: (n_test,) int64, ascending: the number of the loader that each row's example came in; None where
            there was one.
        test_loader_names: their keys, or numbers; empty where there was one.
        checkpoint_steps: the steps of the checkpoints that the scores are sums over; predictions are those at the last.
            Empty where an older file does not tell.
        candidates: whether the scored examples were not trained on, but might be.
        target: what of the test examples is explained, as it was asked for.
        target_names: what that came to for each test example; empty where it is their labels.
        target_classes: the number of the class that was named, or of the two; empty where none was, for tokens, and
            in older files.
        excerpt: what a file that the result was loaded from holds of the trace: texts, labels and words of all that it
            lists.
        common_tokens: (n,) int64, the ids of tokens that more than a tenth of the training examples hold, ascending;
            none for a method without words.
    """

    method: Method
    n_train: int
    test_indices: Tensor
    test_texts: Texts
    test_gradients: list[list[WordGradients]]
    words_of_ids: dict[int, str]
    label_names: dict[int, str]
    predictions: Tensor
    trace: Trace | None
    checkpoint_ids: list[str]
    scores: Tensor | None = None
    strongest_proponents: TopK | None = None
    strongest_opponents: TopK | None = None
    totals: Tensor | None = None
    undrawn: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    test_loaders: Tensor | None = None
    test_loader_names: tuple[str, ...] = ()
    checkpoint_steps: list[int] = field(default_factory=list)
    candidates: bool = False
    target: str = "label"
    target_names: list[str] = field(default_factory=list)
    target_classes: list[int] = field(default_factory=list)
    excerpt: Excerpt | None = None
    common_tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def write(self, path: Path) -> Path:
        """Write what there is to one safetensors file, with the place of the trace, absolute and relative."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors()
        used = set(self.test_texts.ids.tolist())
        if self.excerpt is not None:
            used |= {token for example in self.excerpt.train.values() for token in example.ids}
        header = ResultHeader(
            version=FORMAT_VERSION,
            method=method_to_json(self.method),
            n_train=self.n_train,
            gradients=[[each.n_examples for each in of_block] for of_block in self.test_gradients],
            words_of_ids={
                str(token): storable(str(word)) for token, word in self.words_of_ids.items() if token in used
            },
            label_names={str(number): storable(str(name)) for number, name in self.label_names.items()},
            checkpoint_ids=self.checkpoint_ids,
            trace=None if self.trace is None else storable(str(self.trace.path.absolute())),
            trace_relative=None if self.trace is None else storable(os.path.relpath(self.trace.path, path.parent)),
            test_loader_names=[storable(name) for name in self.test_loader_names],
            checkpoint_steps=self.checkpoint_steps,
            candidates=self.candidates,
            target=storable(self.target),
            target_names=[storable(name) for name in self.target_names],
            target_classes=self.target_classes,
            excerpt=None if self.excerpt is None else header_of(self.excerpt),
        )
        text = header.to_json()
        metadata = {HEADER: text, FILE_CHECKSUM: hash_of_tensors(tensors, text)}
        write_tensors(Path(os.path.realpath(path)), tensors, metadata, alone=True)  # what a link leads to
        return path

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, by name."""
        tensors = {
            "test_indices": self.test_indices,
            **{f"texts.{name}": column for name, column in self.test_texts.columns.items()},
            "predictions": self.predictions,
        }
        kept = {name: getattr(self, name) for name in ("totals", "scores", "test_loaders")}
        tensors |= {name: tensor for name, tensor in kept.items() if tensor is not None}
        tensors |= {name: getattr(self, name) for name in ("undrawn", "common_tokens") if len(getattr(self, name))}
        for name, top in (("proponents", self.strongest_proponents), ("opponents", self.strongest_opponents)):
            if top is not None:
                tensors |= {f"{name}.values": top.values, f"{name}.indices": top.indices}
        for block, of_block in enumerate(self.test_gradients):
            for number, gradients in enumerate(of_block):
                own = {name: column for name, column in gradients.columns.items() if name in WORD_TENSORS}
                tensors |= {f"gradients.{block}.{number}.{name}": column for name, column in own.items()}
        return tensors if self.excerpt is None else tensors | tensors_of(self.excerpt)

    @classmethod
    def load(cls, path: str | Path, trace: str | Path | None = None) -> Self:
        """Read a result that ``save`` wrote; its trace is opened if it is where it was.

        A trace that is there and cannot be read is warned of, and the result has none: its own file is whole without.

        Args:
            path: the file.
            trace: folder of the trace, where it is at another place now; it must be one that can be read.

        Raises:
            FileNotFoundError: if there is no such file, or no trace in the folder.
            TypeError: if either is no path.
            ValueError: if the file holds no result, or one of another version, or is damaged, or if the folder holds
                another trace, or a damaged one.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"A result is one file, but got a {type(path).__name__}: {path!r}. Load them one by one.")
        path = Path(path)
        header, method, tensors = read_result(path)
        excerpt = None if header.excerpt is None else excerpt_from(header.excerpt, tensors, path)
        opened, vocabulary = _find_trace(header, path, excerpt) if trace is None else _trace_of(header, trace, path)
        n_test = len(tensors["test_indices"])
        tops = [
            TopK(tensors[f"{name}.values"], tensors[f"{name}.indices"]) if f"{name}.values" in tensors else None
            for name in ("proponents", "opponents")
        ]
        words = {int(token): word for token, word in header.words_of_ids.items()}
        return cls(
            method=method,
            n_train=header.n_train,
            test_indices=tensors["test_indices"],
            test_texts=_texts(tensors, n_test),
            test_gradients=[
                [_word_gradients(tensors, f"gradients.{block}.{number}", n) for number, n in enumerate(of_block)]
                for block, of_block in enumerate(header.gradients)
            ],
            words_of_ids={**vocabulary, **words},
            label_names={int(number): name for number, name in header.label_names.items()},
            predictions=tensors["predictions"],
            trace=opened,
            checkpoint_ids=header.checkpoint_ids,
            scores=tensors.get("scores"),
            strongest_proponents=tops[0],
            strongest_opponents=tops[1],
            totals=tensors.get("totals"),
            undrawn=tensors.get("undrawn", torch.empty(0, dtype=torch.int64)),
            test_loaders=tensors.get("test_loaders"),
            test_loader_names=tuple(header.test_loader_names),
            checkpoint_steps=header.checkpoint_steps,
            candidates=header.candidates,
            target=header.target,
            target_names=header.target_names,
            target_classes=header.target_classes,
            excerpt=excerpt,
            common_tokens=tensors.get("common_tokens", torch.empty(0, dtype=torch.int64)),
        )


def _texts(tensors: Mapping[str, Tensor], n_examples: int) -> Texts:
    columns = {name.removeprefix("texts."): column for name, column in tensors.items() if name.startswith("texts.")}
    return Texts(n_examples, **columns)


def _word_gradients(tensors: Mapping[str, Tensor], prefix: str, n_examples: int) -> WordGradients:
    return WordGradients(n_examples, **{name: tensors[f"{prefix}.{name}"] for name in WORD_TENSORS})


def left_without_trace(excerpt: Excerpt | None) -> str:
    """What is left of a result whose trace is not at hand, as the end of a sentence."""
    if excerpt is None:
        return "nothing but the scores is left"
    return (
        f"the file of the result holds the words and texts of the {excerpt.k} strongest of each side, and "
        f"self-influence by {described(excerpt.review_method)}, alone"
    )


def _find_trace(header: ResultHeader, path: Path, excerpt: Excerpt | None) -> tuple[Trace | None, Mapping[int, str]]:
    """The trace of a result, if it is where it was, or lies as it did beside the result; and its vocabulary."""
    faults: list[str] = []
    for place in (header.trace, header.trace_relative and path.parent / header.trace_relative):
        if place is not None and os.path.exists(os.path.join(place, "trace.json")):  # noqa: PTH110, PTH118 (never raises)
            try:
                trace = Trace(place)
                if not _is_trace_of(trace, header):
                    continue
                vocabulary = trace.vocabulary
            except (OSError, ValueError) as error:
                faults.append(printable(str(error)))
                continue
            _require_same_number(trace, header, path)
            return trace, vocabulary
    if faults:
        rank_zero_warn(
            f"{path} is loaded without its trace, for what is in its place cannot be read: {faults[0]} Without it, "
            f"{left_without_trace(excerpt)}."
        )
    return None, {}


def _trace_of(header: ResultHeader, folder: str | Path, path: Path) -> tuple[Trace, Mapping[int, str]]:
    """The trace in a folder, which must be the one that a result was computed from; and its vocabulary."""
    trace = Trace(folder)
    if not _is_trace_of(trace, header):
        raise ValueError(f"The trace in {folder} is of another fit than the one that the scores were computed from.")
    _require_same_number(trace, header, path)
    return trace, trace.vocabulary


def _is_trace_of(trace: Trace, header: ResultHeader) -> bool:
    """Whether a trace has the checkpoints of a result."""
    return set(header.checkpoint_ids) <= {each.id for each in trace.checkpoints}


def _require_same_number(trace: Trace, header: ResultHeader, path: Path) -> None:
    """Check that a result has as many training examples as its trace.

    Raises:
        ValueError: if it has not.
    """
    if header.n_train != trace.n_train:
        raise ValueError(
            f"{path} is damaged: it has {header.n_train} training examples, but the trace in {trace.path} has "
            f"{trace.n_train}. Restore the file from a copy, or ask trainer.influence again."
        )
