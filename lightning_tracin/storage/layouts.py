"""What the safetensors files of a trace hold: names, types, shapes and values of the tensors of each kind.

A file is checked before anything in it is used to index, to allocate or to multiply, whoever wrote it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_tracin.gradients.rows import DTYPES, Dtype
from lightning_tracin.gradients.texts import IN_SECOND, MOST_LABELS

#: The type of a tensor, and its sizes: numbers, or names of sizes that must agree with those of other tensors.
Form: TypeAlias = tuple[torch.dtype, tuple[int | str, ...]]

# Integers in which the bits of floats are compared, and the bits of the largest magnitude in a direction of length 1.
_BITS: dict[torch.dtype, tuple[type[np.signedinteger[Any]], int]] = {
    torch.float16: (np.int16, int(np.array(1.01, np.float16).view(np.int16))),
    torch.float32: (np.int32, int(np.array(1.01, np.float32).view(np.int32))),
}

_CHUNK = 2**17  # numbers whose bits fit into the CPU's cache


@dataclass(frozen=True)
class ShardLayout:
    """The tensors of a shard.

    Attributes:
        kind: "words", "factors", "matrix" or "texts".
        dtype: the type that directions are stored in.
        n_examples: number of examples in the shard.
    """

    kind: str
    dtype: Dtype
    n_examples: int

    def check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Check the tensors of a shard, see :class:`~lightning_tracin.storage.files.Layout`."""
        earlier = {"marks", "label_sets"} - tensors.keys() if self.kind == "texts" else set()
        # Texts of earlier versions lack what came later.
        require_forms(tensors, {name: form for name, form in self._forms().items() if name not in earlier})
        examples = tensors["examples"].long()
        require_within("examples", examples, 0, self.n_examples - 1)
        for name in ("norms", "input_norms", "delta_norms"):
            if name in tensors:
                require_within(name, tensors[name], 0, math.inf)
        for name in ("directions", "inputs", "deltas"):
            if name in tensors:
                require_unit(name, tensors[name])
        if "lengths" in tensors:
            longest = 127 * math.sqrt(tensors["directions"].shape[1])
            require_within("lengths", tensors["lengths"], 1, longest * 1.01)
        if self.kind == "texts":
            require_within("ids", tensors["ids"], 0, math.inf)
            require_number_or_nan("labels", tensors["labels"])
            if "marks" in tensors:
                require_within("marks", tensors["marks"], IN_SECOND, math.inf)
            if "label_sets" in tensors:
                require_label_sets("label_sets", tensors["label_sets"])
        if self.kind == "words":
            examples = examples + _tokens_of_rows(tensors) * self.n_examples
        # Each word, or matrix, of an example has one row; it has several positions of which others are.
        require_ascending("examples", examples, strictly=self.kind in ("words", "matrix"))

    def _forms(self) -> dict[str, Form]:
        directions = DTYPES[self.dtype]
        forms: dict[str, Form] = {"examples": (torch.int32, ("rows",))}
        if self.kind == "texts":
            of_tokens: Form = (torch.int32, ("rows",))
            of_examples: Form = (torch.float64, (self.n_examples,))
            return {**forms, "ids": of_tokens, "labels": of_examples, "marks": of_tokens, "label_sets": of_examples}
        if self.kind == "factors":
            norms: Form = (torch.float32, ("rows",))
            return {
                **forms,
                **{"input_norms": norms, "inputs": (directions, ("rows", "in"))},
                **{"delta_norms": norms, "deltas": (directions, ("rows", "out"))},
            }
        forms |= {"norms": (torch.float32, ("rows",)), "directions": (directions, ("rows", "width"))}
        if self.dtype == "int8":
            forms["lengths"] = (torch.float32, ("rows",))
        if self.kind == "words":
            forms |= {"tokens": (torch.int32, ("words",)), "offsets": (torch.int64, ("words + 1",))}
        return forms


@dataclass(frozen=True)
class MomentsLayout:
    """The tensors of second moments.

    Attributes:
        has_words: whether they are of a word embedding table, of which only some rows are stored.
    """

    has_words: bool

    def check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Check the tensors of second moments, see :class:`~lightning_tracin.storage.files.Layout`."""
        forms: dict[str, Form] = {"values": (torch.float32, ("rows", "columns"))}
        if self.has_words:
            forms["rows"] = (torch.int64, ("rows",))
        require_forms(tensors, forms)
        require_within("values", tensors["values"], 0, math.inf)
        if self.has_words:
            require_within("rows", tensors["rows"], 0, 2**31 - 1)
            require_ascending("rows", tensors["rows"], strictly=True)
        if not 0 <= float(metadata.get("eps", "nan")) < math.inf:
            raise ValueError(f"eps is {metadata.get('eps')!r}")


@dataclass(frozen=True)
class ComponentsLayout:
    """The tensors of K-FAC's components.

    Attributes:
        rank: how many there are of inputs and of output gradients, unless these have fewer numbers.
    """

    rank: tuple[int, int]

    def check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Check the tensors of components, see :class:`~lightning_tracin.storage.files.Layout`."""
        forms: dict[str, Form] = {}
        for side in ("inputs", "deltas"):
            forms[f"{side}_basis"] = (torch.float32, (side, f"rank of {side}"))
            forms[f"{side}_values"] = (torch.float64, (f"rank of {side}",))
        require_forms(tensors, forms)
        for side, number in zip(("inputs", "deltas"), self.rank, strict=True):
            width, found = tensors[f"{side}_basis"].shape
            if found != min(number, width) or not width:
                raise ValueError(f"{side}_basis has {found} components of {width}, but should have {number}, or all")
            require_unit(f"{side}_basis", tensors[f"{side}_basis"])
            require_within(f"{side}_values", tensors[f"{side}_values"], 0, math.inf)
            mean = metadata.get(f"{side}_mean")
            if not 0 <= float("nan" if mean is None else mean) < math.inf:
                raise ValueError(f"{side}_mean is {mean!r}")


@dataclass(frozen=True)
class DrawnLayout:
    """The examples that training has drawn.

    Attributes:
        n_train: number of training examples.
    """

    n_train: int

    def check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Check the tensor, see :class:`~lightning_tracin.storage.files.Layout`."""
        require_forms(tensors, {"drawn": (torch.bool, (self.n_train,))})
        if bool((tensors["drawn"].view(torch.uint8) > 1).any()):
            raise ValueError("drawn holds bytes that are neither 0 nor 1")


@dataclass(frozen=True)
class WeightsLayout:
    """The tensors of a state dict.

    Attributes:
        fingerprint: of the names and shapes of the model that was trained.
    """

    fingerprint: str

    def check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Check the tensors of a state dict, see :class:`~lightning_tracin.storage.files.Layout`."""
        unknown = sorted(set(metadata.values()) - tensors.keys())
        if unknown:
            raise ValueError(f"weights are tied to {unknown[0]}, which is not in it")
        state = {**tensors, **{alias: tensors[name] for alias, name in metadata.items()}}
        if model_fingerprint(state) != self.fingerprint:
            raise ValueError("its weights have other names or shapes than those of the model that was trained")


def model_fingerprint(state: Mapping[str, Any]) -> str:
    """A hash of the names and shapes of a state dict's tensors."""
    return hashlib.sha256(repr(sorted(shapes_of(state).items())).encode()).hexdigest()


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a state dict's tensors, by name."""
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def require_forms(tensors: Mapping[str, Tensor], forms: Mapping[str, Form]) -> None:
    """Check that tensors have the names, types and shapes that they should have.

    Raises:
        ValueError: if they have others.
    """
    missing, unknown = sorted(forms.keys() - tensors.keys()), sorted(tensors.keys() - forms.keys())
    if missing or unknown:
        raise ValueError(f"it lacks the tensors {missing} and has {unknown} besides")
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in forms.items():
        tensor = tensors[name]
        known = [size if isinstance(size, int) else sizes.get(size) for size in shape]
        fits = len(known) == tensor.dim() and all(
            size in (None, actual) for size, actual in zip(known, tensor.shape, strict=True)
        )
        if tensor.dtype != dtype or not fits:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but should be {dtype} of {shape}"
            )
        sizes.update({size: actual for size, actual in zip(shape, tensor.shape, strict=True) if isinstance(size, str)})


def require_within(name: str, values: Tensor, low: float, high: float) -> None:
    """Check that numbers are finite and within bounds.

    Raises:
        ValueError: if one is not.
    """
    if not values.numel():
        return
    least, most = (float(each) for each in torch.aminmax(values))
    if not (low <= least and most <= high and math.isfinite(least) and math.isfinite(most)):
        raise ValueError(f"{name} holds numbers from {least:g} to {most:g}, but should be from {low:g} to {high:g}")


def require_number_or_nan(name: str, values: Tensor) -> None:
    """Check that no number is infinite; NaN stands for one that is not known.

    Raises:
        ValueError: if one is.
    """
    require_within(name, values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), -math.inf, math.inf)


def require_label_sets(name: str, values: Tensor) -> None:
    """Check that each number is the sum of some powers of two, or NaN.

    Raises:
        ValueError: if one is not.
    """
    known = values[~torch.isnan(values)]
    require_within(name, known, 0, 2.0**MOST_LABELS - 1)
    if bool((known != known.round()).any()):
        raise ValueError(f"{name} holds a number that is no set of labels")


def require_ascending(name: str, values: Tensor, *, strictly: bool) -> None:
    """Check that numbers are sorted.

    Raises:
        ValueError: if they are not, or if one is there twice and must not be.
    """
    if len(values) > 1 and int(values.diff().min()) < int(strictly):
        raise ValueError(f"{name} are not sorted{', or one is there twice' * strictly}")


def require_unit(name: str, values: Tensor) -> None:
    """Check that no number of directions is larger than those of a direction of length 1; int8 may be anything.

    Raises:
        ValueError: if one is, or is NaN.
    """
    if values.dtype not in _BITS:
        return
    kind, limit = _BITS[values.dtype]
    # Without their signs, floats are ordered as the integers with the same bits are, and NaN comes last: ten times as
    # fast as comparing float16, which matters for gigabytes.
    bits = values.contiguous().numpy().view(kind).reshape(-1)
    without_sign = np.empty(min(_CHUNK, len(bits)), kind)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        found = np.bitwise_and(chunk, np.iinfo(kind).max, out=without_sign[: len(chunk)]).max()
        if found > limit:
            raise ValueError(f"{name} holds NaN, or numbers above 1")


def _tokens_of_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """The token of each row, from where the rows of each begin."""
    tokens, offsets = tensors["tokens"].long(), tensors["offsets"]
    n_rows = len(tensors["examples"])
    require_within("tokens", tokens, 0, math.inf)
    require_ascending("tokens", tokens, strictly=True)
    require_ascending("offsets", offsets, strictly=True)
    ends: Sequence[int] = offsets[[0, -1]].tolist() if len(offsets) else ()
    if len(offsets) != len(tokens) + 1 or ends != [0, n_rows]:
        raise ValueError(f"{len(offsets)} offsets from {ends} do not divide {n_rows} rows among {len(tokens)} tokens")
    return torch.repeat_interleave(tokens, offsets.diff())
