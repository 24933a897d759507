"""What the JSON files of a trace hold: one typed class for each kind, which everything read or written goes through.

What a stranger's file says is not believed before it has these types and ranges: names come from a fixed set, and no
number is larger than what can be meant. A field that is added here is read, written and verified with the others; where
older traces lack it, give it a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.gradients.sites import KEY_PATTERN, Site
from lightning_tracin.storage.files import damage_named, json_bytes, parsed_json, write_json

#: Of traces and of saved results.
FORMAT_VERSION = 2

#: What the header of a trace says it is.
FORMAT: Final = "lightning_tracin trace"

# One number for each training example has to fit into memory.
_MOST_EXAMPLES = 2**27

#: A shard holds at most this many examples, however small they are.
MOST_SHARD_EXAMPLES = 4096

_FILES_OF_CHECKPOINT = rf"\A(weights|drawn|frozen-[0-9a-f]{{32}}|second-moments-({KEY_PATTERN}))\.safetensors\Z"

Count: TypeAlias = Annotated[int, Meta(ge=0, le=_MOST_EXAMPLES)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=_MOST_EXAMPLES)]
StepNumber: TypeAlias = Annotated[int, Meta(ge=0, le=999_999_999)]
Identity: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z_-]{1,64}\Z")]
Checksum: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Rate: TypeAlias = Annotated[float, Meta(ge=-1e30, le=1e30)]
Label: TypeAlias = Annotated[str, Meta(max_length=10_000)]
Key: TypeAlias = Annotated[str, Meta(pattern=rf"\A({KEY_PATTERN})\Z")]

#: A token id or a number of a class, as JSON has it for a key.
Number: TypeAlias = Annotated[str, Meta(pattern=r"\A(0|-?[1-9][0-9]{0,17})\Z")]

#: One optimizer step: its number (``trainer.global_step`` before it), the optimizer, the rate of each of its groups,
#: and the keys of the sites that it did not move, because their weights had no gradient.
Step: TypeAlias = tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)], list[Rate], list[Key]]


class JsonFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any of the files."""

    checksum: str = ""  # of the rest; it is written and verified by the functions of `files`


_File = TypeVar("_File", bound=JsonFile)


class TraceHeader(JsonFile, frozen=True, kw_only=True):
    """What is known of a fit before its first checkpoint.

    Attributes:
        n_train: number of training examples.
        data_fingerprint: a hash of the training set.
        model_fingerprint: a hash of the names and shapes of the model's weights.
        model_class: name of the model's class.
        sites: the sites at which gradients are taken, and the form in which they are stored.
        dtype: the type that directions are stored in.
        shard_examples: number of training examples in each shard.
        candidates: whether these examples were not trained on, but are scored for what training on them would do.
        notes: sentences that each result says of the trace, such as what is approximate in it.
    """

    n_train: Size
    data_fingerprint: Label
    model_fingerprint: Label
    model_class: Label
    sites: Annotated[tuple[Site, ...], Meta(min_length=1, max_length=10_000)]
    dtype: Dtype
    shard_examples: Annotated[int, Meta(ge=1, le=MOST_SHARD_EXAMPLES)]
    candidates: bool = False
    notes: Annotated[tuple[Label, ...], Meta(max_length=100)] = ()

    def __post_init__(self) -> None:
        if len({site.key for site in self.sites}) < len(self.sites):
            raise ValueError("two sites have the same key")


class TraceFile(TraceHeader, frozen=True, kw_only=True):
    """``trace.json``.

    Attributes:
        id: unique.
        branched_from: the id of the trace that it goes on with.
        incomplete: why the recording ended before the fit.
        ended_at: the step at which it did.
    """

    format: Literal["lightning_tracin trace"]
    version: Annotated[int, Meta(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    id: Identity
    branched_from: Identity | None = None
    incomplete: str | None = None
    ended_at: StepNumber | None = None


class CheckpointFile(JsonFile, frozen=True, kw_only=True, omit_defaults=True):
    """``checkpoint.json``; the attributes are those of :class:`~lightning_tracin.storage.checkpoint.Checkpoint`.

    A checkpoint without weights says so itself: where only their file is gone, that is noticed. What is as it mostly is
    is not written, so that earlier versions can read it.
    """

    id: Identity
    step: StepNumber
    epoch: StepNumber
    previous: Identity | None
    steps: list[Step]
    groups: list[list[list[str]]]
    checksums: dict[Annotated[str, Meta(pattern=_FILES_OF_CHECKPOINT)], Checksum]
    keeps_weights: bool = True
    repeats: list[Annotated[int, Meta(ge=1, le=999_999_999)]] = []

    def __post_init__(self) -> None:
        if len(self.repeats) not in (0, len(self.steps)):
            raise ValueError(f"it has {len(self.steps)} steps, but says of {len(self.repeats)} for how many they stand")
        if self.keeps_weights and "weights.safetensors" not in self.checksums:
            raise ValueError("there is no checksum of weights.safetensors in it")
        weights = [name for name in self.checksums if name.startswith(("weights", "frozen"))]
        if weights and not self.keeps_weights:
            raise ValueError(f"it keeps no weights, but names {weights[0]}")


class IndexFile(JsonFile, frozen=True, kw_only=True):
    """``index.json`` of a folder of shards; see :class:`~lightning_tracin.storage.shards.Shards`."""

    kind: Literal["words", "factors", "matrix", "texts"]
    dtype: Dtype
    n_examples: Count
    shard_examples: Annotated[int, Meta(ge=1, le=MOST_SHARD_EXAMPLES)]
    checksums: list[Checksum | None]
    not_finite: list[Count]
    components: Checksum | None = None

    def __post_init__(self) -> None:
        if not any(self.checksums):
            raise ValueError("there is no checksum of a shard in it")
        if any(example >= self.n_examples for example in self.not_finite):
            raise ValueError(f"not_finite names examples from {self.n_examples} on, which are none")


class VocabularyFile(JsonFile, frozen=True, kw_only=True):
    """``vocabulary.json``: what to print for each token id."""

    words: dict[Number, str]


class HeaderOfAnyVersion(Struct, frozen=True):
    """As much of ``trace.json`` as has to be understood of every version."""

    format: str = ""
    version: int = 0
    removed: bool = False


def read(path: Path, kind: type[_File], *, within: Path | None = None) -> _File:
    """Read a JSON file.

    Args:
        path: the file.
        kind: what it must hold.
        within: the folder that no link may lead out of.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, does not hold what it must, or has another checksum than was written.
    """
    content = json_bytes(path, within)
    with damage_named(path):
        typed = msgspec.json.decode(content, type=kind)  # first: what has these types takes little memory
        parsed_json(content)
    return typed


def write(path: Path, content: JsonFile) -> None:
    """Write a JSON file atomically, if it could be read again.

    Raises:
        OSError: if it cannot be written.
        ValueError: if its content is not of its types.
    """
    plain = msgspec.to_builtins(content, str_keys=True)
    try:
        msgspec.convert(plain, type=type(content))
    except msgspec.ValidationError as error:
        raise ValueError(f"{path} was not written: {error}.") from error
    write_json(path, plain)


def header_of_any_version(path: Path) -> HeaderOfAnyVersion:
    """What a header says of itself, whatever version wrote it; its checksum is not verified.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no regular file, or no JSON object.
    """
    content = json_bytes(path)
    with damage_named(path):
        return msgspec.json.decode(content, type=HeaderOfAnyVersion)
