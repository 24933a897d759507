"""What the file of a result holds: its header, typed, and its tensors; both are checked before they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from lightning_tracin.gradients.texts import IN_SECOND
from lightning_tracin.results.excerpt_file import ExcerptHeader, check_excerpt, forms_of
from lightning_tracin.results.packed_examples import REPAIR
from lightning_tracin.scoring.methods import Method, word_part
from lightning_tracin.scoring.naming import method_from_json
from lightning_tracin.storage.files import (
    damage_named,
    hash_of_tensors,
    object_from_json,
    open_tensors,
    require_small,
    status_of,
)
from lightning_tracin.storage.layouts import (
    Form,
    require_ascending,
    require_forms,
    require_label_sets,
    require_number_or_nan,
    require_unit,
    require_within,
)
from lightning_tracin.storage.own_files import has_trace
from lightning_tracin.storage.schemas import FORMAT_VERSION, Count, Identity, Label, Number, Size, StepNumber

#: The file's metadata: what is not a tensor, as JSON, and the checksum of that and of all tensors.
HEADER, FILE_CHECKSUM = "lightning_tracin.result", "lightning_tracin.checksum"

#: The tensors of each block of word gradients.
WORD_TENSORS = ("examples", "tokens", "norms", "directions")

_MOST_ID = 2**31 - 1

# A file of so many bytes is read into memory: of a larger one, which is mapped, what somebody writes into it is read.
_MOST_IN_MEMORY = 2**30


class ResultHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a result is not a tensor.

    Attributes:
        version: of the format.
        method: what the scores are, as :func:`~lightning_tracin.scoring.naming.method_to_json` has it.
        n_train: number of training examples.
        gradients: for each block of test examples, their number at each checkpoint.
        words_of_ids: what to print for token ids.
        label_names: what to print for labels.
        checkpoint_ids: of the checkpoints that the scores are sums over.
        trace: absolute path of the trace; None without one.
        trace_relative: the same, from the folder of the result.
        test_loader_names: of the loaders that test examples came in, where there were several.
        checkpoint_steps: the steps of the checkpoints; empty in older files.
        candidates: whether the scored examples were not trained on.
        target: what of the test examples is explained.
        target_names: what that came to for each test example; none where it is their labels.
        target_classes: the numbers of the class, or of the two, that the target names; empty in older files.
        excerpt: what the result holds of its trace; None where that is nothing.
    """

    version: int
    method: dict[str, Any]
    n_train: Size
    gradients: list[list[Count]]
    words_of_ids: dict[Number, str]
    label_names: dict[Number, str]
    checkpoint_ids: Annotated[list[Identity], Meta(min_length=1)]
    trace: str | None
    trace_relative: str | None
    test_loader_names: list[str] = []
    checkpoint_steps: list[StepNumber] = []
    candidates: bool = False
    target: Label = "label"
    target_names: list[str] = msgspec.field(default_factory=list)
    target_classes: Annotated[list[Annotated[int, Meta(ge=0, le=_MOST_ID)]], Meta(max_length=2)] = []
    excerpt: ExcerptHeader | None = None

    def to_json(self) -> str:
        """The header as JSON.

        Raises:
            ValueError: if it could not be read again.
        """
        encoded = msgspec.json.encode(self)
        try:
            msgspec.json.decode(encoded, type=ResultHeader)
        except msgspec.ValidationError as error:
            raise ValueError(f"The result cannot be saved: {error}.") from error
        return encoded.decode()


class _HeaderOfAnyVersion(msgspec.Struct, frozen=True):
    version: int


def read_result(path: Path) -> tuple[ResultHeader, Method, dict[str, Tensor]]:
    """The header, the method and the tensors of a result's file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no result, or one of another version, or is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: there is no result to load.")
    if path.is_dir():
        what = "a trace: Trace opens it, and trainer.influence(..., trace=...) makes results of it"
        raise ValueError(f"A result is one file, but {path} is a folder{f', {what}' if has_trace(path) else ''}.")
    size = status_of(path).st_size
    try:
        tensors, metadata = open_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} holds no InfluenceResult, or is damaged: {error.__cause__}. {REPAIR}") from error
    if size <= _MOST_IN_MEMORY:
        tensors = {name: each.clone() for name, each in tensors.items()}
    if HEADER not in metadata:
        raise ValueError(f"{path} holds no InfluenceResult, or is damaged: its metadata has no {HEADER}. {REPAIR}")
    text, written = metadata[HEADER], metadata.get(FILE_CHECKSUM)
    with damage_named(path, REPAIR):
        actual = hash_of_tensors(tensors, text)
        if written not in (actual, None):
            raise ValueError(f"it has the checksum {actual}, but {written} was written")
        content = text.encode()
        require_small(content)
        version = msgspec.json.decode(content, type=_HeaderOfAnyVersion).version
    if version != FORMAT_VERSION:
        remedy = "Update lightning_tracin" if version > FORMAT_VERSION else "Ask trainer.influence again"
        raise ValueError(
            f"{path} is of format version {version}, but this lightning_tracin reads version {FORMAT_VERSION}. "
            f"{remedy}."
        )
    with damage_named(path, REPAIR):
        if written is None:  # only now: results of version 1 have none
            raise ValueError(f"its metadata has no {FILE_CHECKSUM}")
        header = msgspec.json.decode(content, type=ResultHeader)
        object_from_json(content)
        method = method_from_json(header.method)
        _check(header, method, tensors)
    return header, method, tensors


def _check(header: ResultHeader, method: Method, tensors: Mapping[str, Tensor]) -> None:
    """Check that a result's tensors have the shapes and ranges that its header tells.

    Raises:
        ValueError: if they have not.
    """
    n_test = len(tensors["test_indices"]) if tensors.get("test_indices", torch.empty(())).dim() else 0
    require_forms(tensors, _forms(header, tensors, n_test))
    _check_header(header, n_test)
    require_within("test_indices", tensors["test_indices"], 0, 2**53)
    _check_loaders(header, tensors)
    require_within("texts.examples", tensors["texts.examples"], 0, n_test - 1)
    require_ascending("texts.examples", tensors["texts.examples"], strictly=False)
    require_within("texts.ids", tensors["texts.ids"], 0, _MOST_ID)
    require_number_or_nan("texts.labels", tensors["texts.labels"])
    require_number_or_nan("predictions", tensors["predictions"])
    ranges = {
        "texts.marks": (IN_SECOND, _MOST_ID),
        "undrawn": (0, header.n_train - 1),
        "common_tokens": (0, _MOST_ID),
        "totals": (-math.inf, math.inf),
        "scores": (-math.inf, math.inf),
    }
    for name in ranges.keys() & tensors.keys():
        require_within(name, tensors[name], *ranges[name])
    if "texts.label_sets" in tensors:
        require_label_sets("texts.label_sets", tensors["texts.label_sets"])
    for name in {"undrawn", "common_tokens"} & tensors.keys():
        require_ascending(name, tensors[name], strictly=True)
    for name, falling in (("proponents", -1), ("opponents", 1)):
        if f"{name}.values" in tensors:
            values = tensors[f"{name}.values"]
            require_within(f"{name}.values", values, -math.inf, math.inf)
            require_within(f"{name}.indices", tensors[f"{name}.indices"], 0, header.n_train - 1)
            if bool((values.diff(dim=1) * falling < 0).any()):
                raise ValueError(f"{name}.values are not sorted")
    _check_gradients(header, method, tensors, n_test)
    if header.excerpt is not None:
        check_excerpt(header.excerpt, tensors, header.n_train)


def _check_loaders(header: ResultHeader, tensors: Mapping[str, Tensor]) -> None:
    """Check that test examples ascend inside the loaders that they came in, and that each of these has a name.

    Raises:
        ValueError: if they do not.
    """
    indices, names = tensors["test_indices"], header.test_loader_names
    if "test_loaders" not in tensors:
        if names:
            raise ValueError(f"it names {len(names)} loaders, but does not tell which test examples came in which")
        require_ascending("test_indices", indices, strictly=True)
        return
    loaders = tensors["test_loaders"]
    require_ascending("test_loaders", loaders, strictly=False)
    if len(set(names)) < len(names) or set(loaders.tolist()) != set(range(len(names))):
        raise ValueError(f"its test examples are not of {len(names)} loaders with names of their own")
    for part in torch.split(indices, loaders.bincount().tolist()):
        require_ascending("test_indices", part, strictly=True)


def _check_header(header: ResultHeader, n_test: int) -> None:
    """Check that the numbers in a header go together.

    Raises:
        ValueError: if they do not.
    """
    if not n_test:
        raise ValueError("it has no test examples")
    if len(set(header.checkpoint_ids)) < len(header.checkpoint_ids):
        raise ValueError("it names a checkpoint twice")
    if len(header.checkpoint_steps) not in (0, len(header.checkpoint_ids)):
        raise ValueError(f"it has {len(header.checkpoint_ids)} checkpoints, but {len(header.checkpoint_steps)} steps")
    if len(header.target_names) != (0 if header.target == "label" else n_test):
        raise ValueError(
            f"it names the targets ({header.target!r}) of {len(header.target_names)} test examples, but has {n_test}"
        )
    classes = header.target_classes
    if classes and (header.target in ("label", "prediction") or len(set(classes)) < len(classes)):
        raise ValueError(f"its target {header.target!r} cannot be of the classes {classes}")


def _forms(header: ResultHeader, tensors: Mapping[str, Tensor], n_test: int) -> dict[str, Form]:
    """The tensors that a result must have, given its header, and those that it has of several kinds."""
    forms: dict[str, Form] = {
        "test_indices": (torch.int64, (n_test,)),
        "texts.examples": (torch.int64, ("tokens",)),
        "texts.ids": (torch.int64, ("tokens",)),
        "texts.labels": (torch.float64, (n_test,)),
        "predictions": (torch.float64, (n_test, 2)),
    }
    later: dict[str, Form] = {  # than the first version of the format
        "texts.marks": (torch.int64, ("tokens",)),
        "texts.label_sets": (torch.float64, (n_test,)),
        "test_loaders": (torch.int64, (n_test,)),
        "undrawn": (torch.int64, ("undrawn",)),
        "common_tokens": (torch.int64, ("common_tokens",)),
    }
    forms |= {name: form for name, form in later.items() if name in tensors}
    if "totals" in tensors:
        forms["totals"] = (torch.float64, (n_test, 2))
    if "scores" in tensors:
        forms["scores"] = (torch.float32, (n_test, header.n_train))
    else:
        kept = tensors.get("proponents.values", torch.empty(0))
        k = kept.shape[1] if kept.dim() == 2 else 0
        if not 1 <= k <= header.n_train:
            raise ValueError(f"it has neither scores nor the strongest of {header.n_train} training examples")
        for name in ("proponents", "opponents"):
            forms[f"{name}.values"] = (torch.float32, (n_test, k))
            forms[f"{name}.indices"] = (torch.int64, (n_test, k))
    for block, of_block in enumerate(header.gradients):
        for number in range(len(of_block)):
            rows = f"rows {block}.{number}"
            columns: dict[str, Form] = {
                "examples": (torch.int64, (rows,)),
                "tokens": (torch.int64, (rows,)),
                "norms": (torch.float32, (rows,)),
                "directions": (torch.float32, (rows, f"width {number}")),
            }
            forms |= {f"gradients.{block}.{number}.{name}": form for name, form in columns.items()}
    if header.excerpt is not None:
        forms |= forms_of(header.excerpt, n_test, header.n_train)
    return forms


def _check_gradients(header: ResultHeader, method: Method, tensors: Mapping[str, Tensor], n_test: int) -> None:
    """Check the word gradients of the test examples, of which each block has those of every checkpoint.

    Raises:
        ValueError: if they are not so.
    """
    if word_part(method) is None:
        if header.gradients:
            raise ValueError("it has word gradients, but its method has no words")
        return
    sizes = [of_block[0] if of_block else 0 for of_block in header.gradients]
    n_checkpoints = len(header.checkpoint_ids)
    if sum(sizes) != n_test or any(set(each) != {each[0]} or len(each) != n_checkpoints for each in header.gradients):
        raise ValueError(f"it has word gradients of {header.gradients} test examples, but {n_test} test examples")
    for block, size in enumerate(sizes):
        for number in range(n_checkpoints):
            examples, tokens, norms, directions = (
                tensors[f"gradients.{block}.{number}.{name}"] for name in WORD_TENSORS
            )
            require_within("examples of gradients", examples, 0, size - 1)
            require_within("tokens of gradients", tokens, 0, _MOST_ID)
            require_within("norms of gradients", norms, 0, math.inf)
            require_unit("directions of gradients", directions)
            require_ascending("rows of gradients", tokens * size + examples, strictly=True)
