"""How an excerpt lies in the file of a result: a part of the header, and tensors, which are checked before use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from lightning_tracin.gradients.printable import storable
from lightning_tracin.report.word_table import WordTable
from lightning_tracin.results.excerpt import Excerpt, PairTerms
from lightning_tracin.results.packed_examples import PackedExamples
from lightning_tracin.scoring.label_review import LabelReview, order_of
from lightning_tracin.scoring.naming import method_from_json, method_to_json
from lightning_tracin.storage.layouts import (
    Form,
    require_ascending,
    require_number_or_nan,
    require_within,
)
from lightning_tracin.storage.schemas import Count, Label, Size

_PREFIX = "excerpt."

_TERMS, _REVIEW = (
    ("first", "indices", "offsets", "tokens", "values"),
    ("self_influence", "given", "predicted", "scores"),
)

_WORD_TABLE = ("values", "examples", "class_sizes", "label_sizes", "magnitudes")


class WordTableHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The names of a word table, what it is about, and how many words it leaves out."""

    words: list[str]
    special: list[bool]
    classes: list[str]
    labels: list[str]
    n_left: Annotated[int, Meta(ge=0, le=2**53)]
    target: Label = "label"
    common: list[bool] = []


class ExcerptHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of an excerpt is not a tensor; the fields are those of :class:`Excerpt`."""

    k: Size
    n_train: Count
    has_terms: bool
    review_method: dict[str, Any]
    word_table: WordTableHeader | None
    notes: Annotated[list[str], Meta(max_length=1000)]


def header_of(excerpt: Excerpt) -> ExcerptHeader:
    """The part of the header."""
    table = excerpt.word_table
    return ExcerptHeader(
        k=excerpt.k,
        n_train=len(excerpt.train),
        has_terms=excerpt.terms is not None,
        review_method=method_to_json(excerpt.review_method),
        word_table=None
        if table is None
        else WordTableHeader(
            words=[storable(word) for word in table.words],
            special=list(table.special),
            classes=[storable(name) for name in table.classes],
            labels=[storable(name) for name in table.labels],
            n_left=table.n_left,
            target=storable(table.target),
            common=list(table.common),
        ),
        notes=[storable(note) for note in excerpt.notes],
    )


def tensors_of(excerpt: Excerpt) -> dict[str, Tensor]:
    """The tensors, by name."""
    tensors = {f"review.{name}": getattr(excerpt.review, name) for name in (*_REVIEW, "is_issue")}
    for name, packed in (("tests", excerpt.tests), ("train", excerpt.train)):
        tensors |= {f"{name}.offsets": packed.offsets, f"{name}.content": packed.content}
    tensors["train.indices"] = excerpt.train.numbers
    if excerpt.terms is not None:
        tensors |= {f"terms.{name}": getattr(excerpt.terms, name) for name in _TERMS}
    if excerpt.word_table is not None:
        tensors |= {f"word_table.{name}": getattr(excerpt.word_table, name) for name in _WORD_TABLE}
    return {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def excerpt_from(header: ExcerptHeader, tensors: Mapping[str, Tensor], path: Path) -> Excerpt:
    """The excerpt of a result's file, whose tensors have been checked.

    Args:
        header: its part of the file's header.
        tensors: of the file.
        path: of the file, for errors.
    """
    own = {name.removeprefix(_PREFIX): each for name, each in tensors.items() if name.startswith(_PREFIX)}
    test_indices, undrawn = tensors["test_indices"], tensors.get("undrawn", torch.empty(0, dtype=torch.int64))
    rows, listed = torch.arange(len(test_indices)), own["train.indices"]
    influence = own["review.self_influence"]
    review = {name: own[f"review.{name}"] for name in (*_REVIEW, "is_issue")}
    table = header.word_table
    return Excerpt(
        k=header.k,
        tests=PackedExamples(rows, test_indices, own["tests.offsets"], own["tests.content"], path),
        train=PackedExamples(listed, listed, own["train.offsets"], own["train.content"], path),
        terms=PairTerms(**{name: own[f"terms.{name}"] for name in _TERMS}) if header.has_terms else None,
        review=LabelReview(**review, order=order_of(influence, undrawn)),
        review_method=method_from_json(header.review_method),
        word_table=None
        if table is None
        else WordTable(
            words=tuple(table.words),
            special=tuple(table.special),
            classes=tuple(table.classes),
            labels=tuple(table.labels),
            n_left=table.n_left,
            target=table.target,
            common=tuple(table.common),
            **{name: own[f"word_table.{name}"] for name in _WORD_TABLE},
        ),
        notes=header.notes,
    )


def forms_of(header: ExcerptHeader, n_test: int, n_train: int) -> dict[str, Form]:
    """The tensors that an excerpt must have, given its header."""
    forms: dict[str, Form] = {
        "tests.offsets": (torch.int64, (n_test + 1,)),
        "tests.content": (torch.uint8, ("bytes of tests",)),
        "train.indices": (torch.int64, (header.n_train,)),
        "train.offsets": (torch.int64, (header.n_train + 1,)),
        "train.content": (torch.uint8, ("bytes of training examples",)),
        "review.self_influence": (torch.float32, (n_train,)),
        "review.given": (torch.float64, (n_train,)),
        "review.predicted": (torch.float64, (n_train,)),
        "review.scores": (torch.float32, (n_train,)),
        "review.is_issue": (torch.bool, (n_train,)),
    }
    if header.has_terms:
        forms |= {
            "terms.first": (torch.int64, (n_test + 1,)),
            "terms.indices": (torch.int64, ("pairs",)),
            "terms.offsets": (torch.int64, ("ends of pairs",)),
            "terms.tokens": (torch.int32, ("terms",)),
            "terms.values": (torch.float64, ("terms",)),
        }
    if header.word_table is not None:
        n_words, n_classes, n_labels = (
            len(names) for names in (header.word_table.words, header.word_table.classes, header.word_table.labels)
        )
        forms |= {
            "word_table.values": (torch.float32, (n_words, n_classes, n_labels)),
            "word_table.examples": (torch.int64, (n_words, n_labels)),
            "word_table.class_sizes": (torch.int64, (n_classes,)),
            "word_table.label_sizes": (torch.int64, (n_labels,)),
            "word_table.magnitudes": (torch.float32, (n_classes,)),
        }
    return {f"{_PREFIX}{name}": form for name, form in forms.items()}


def check_excerpt(header: ExcerptHeader, tensors: Mapping[str, Tensor], n_train: int) -> None:
    """Check the values of an excerpt's tensors, whose forms are right.

    Raises:
        ValueError: if they are not such as an excerpt has.
    """

    def own(name: str) -> Tensor:
        return tensors[f"{_PREFIX}{name}"]

    method_from_json(header.review_method)
    for side in ("tests", "train"):
        _require_divides(f"offsets of {side}", own(f"{side}.offsets"), len(own(f"{side}.content")))
    require_within("listed examples", own("train.indices"), 0, n_train - 1)
    require_ascending("listed examples", own("train.indices"), strictly=True)
    require_within("self-influence", own("review.self_influence"), -math.inf, math.inf)
    require_number_or_nan("given labels", own("review.given"))
    require_number_or_nan("predicted labels", own("review.predicted"))
    require_within("label scores", own("review.scores").nan_to_num(nan=0.0), 0, 1)
    if header.has_terms:
        _check_terms(PairTerms(**{name: own(f"terms.{name}") for name in _TERMS}), n_train)
    table = header.word_table
    if table is not None:
        for told in (table.special, table.common or table.special):
            if len(told) != len(table.words):
                raise ValueError(f"its word table has {len(table.words)} words, but says of {len(told)} what they are")
        require_within("the word table", own("word_table.values"), -math.inf, math.inf)
        for name in ("examples", "class_sizes", "label_sizes", "magnitudes"):
            require_within(f"{name} of the word table", own(f"word_table.{name}"), 0, math.inf)


def _check_terms(terms: PairTerms, n_train: int) -> None:
    """Check the terms of pairs."""
    n_pairs = len(terms.indices)
    _require_divides("pairs of test examples", terms.first, n_pairs)
    if len(terms.offsets) != n_pairs + 1:
        raise ValueError(f"{len(terms.offsets)} offsets of terms are not those of {n_pairs} pairs")
    _require_divides("terms of pairs", terms.offsets, len(terms.tokens))
    require_within("indices of pairs", terms.indices, 0, n_train - 1)
    rows = torch.repeat_interleave(torch.arange(len(terms.first) - 1), terms.first.diff())
    require_ascending("indices of pairs", rows * n_train + terms.indices, strictly=True)
    require_within("tokens of terms", terms.tokens, 0, 2**31 - 1)
    require_within("terms", terms.values, -math.inf, math.inf)


def _require_divides(name: str, offsets: Tensor, n: int) -> None:
    """Check that offsets begin at 0, ascend, and end at a number."""
    require_ascending(name, offsets, strictly=False)
    if offsets[[0, -1]].tolist() != [0, n]:
        raise ValueError(f"{name} do not divide {n} of them")
