"""Trace: the folder that a fit leaves behind.

JSON and safetensors only. Every file, every folder of gradients and every checkpoint appears whole or not at all: it is
written under a name that ends in ``.partial`` and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.rows import DTYPES, Dtype
from lightning_tracin.gradients.sites import Site, sites_from_json
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.files import PARTIAL, read_json, write_json
from lightning_tracin.storage.own_files import FORMAT, HEADER, copy_before, remove_folder, remove_trace, require_free
from lightning_tracin.storage.shards import Shards

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TraceHeader:
    """What a trace knows before its first checkpoint.

    Attributes:
        n_train: number of training examples.
        data_fingerprint: of the training set.
        model_fingerprint: of the names and shapes of the model's weights.
        model_class: name of its class.
        sites: where gradients are taken, and what is stored of them.
        dtype: what directions are stored in.
        shard_examples: training examples in each file of gradients.
    """

    n_train: int
    data_fingerprint: str
    model_fingerprint: str
    model_class: str
    sites: tuple[Site, ...]
    dtype: Dtype
    shard_examples: int


class Trace:
    """Opens the folder that a fit with :class:`~lightning_tracin.TracInCallback` left behind.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if there is no trace in the folder.
        ValueError: if another version of lightning_tracin wrote it, or it is damaged.

    Example::

        for checkpoint in Trace("trace").checkpoints:
            print(checkpoint.step, checkpoint.learning_rate)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / HEADER).exists():
            raise FileNotFoundError(
                f"There is no trace in {self.path.absolute()}: it holds no {HEADER}. Fit with TracInCallback first, or "
                "pass the folder that it wrote to."
            )
        content = read_json(self.path / HEADER)
        if isinstance(content, dict) and content.get("removed"):
            raise FileNotFoundError(
                f"The trace in {self.path.absolute()} was being replaced by that of another fit, which was broken off "
                "before it began. Fit again into this folder, or into another."
            )
        found = read_json(self.path / HEADER, ["version"])["version"]
        if found != FORMAT_VERSION:
            remedy = "Update lightning_tracin, or fit again" if found > FORMAT_VERSION else "Fit again"
            raise ValueError(
                f"The trace in {self.path} is of format version {found}, but this lightning_tracin reads version "
                f"{FORMAT_VERSION}. {remedy}."
            )
        content = read_json(self.path / HEADER, ["id", *(each.name for each in fields(TraceHeader))])
        self.id: str = content["id"]
        self.n_train: int = content["n_train"]
        self.data_fingerprint: str = content["data_fingerprint"]
        self.model_fingerprint: str = content["model_fingerprint"]
        self.model_class: str = content["model_class"]
        self.shard_examples: int = content["shard_examples"]
        self.dtype: Dtype = content["dtype"]
        self.incomplete: str | None = content.get("incomplete")
        try:
            self.sites = sites_from_json(content["sites"])
            if not self.sites or self.dtype not in DTYPES:
                raise ValueError(f"it has {len(self.sites)} sites, in {self.dtype!r}")
        except ValueError as error:
            raise ValueError(
                f"{self.path / HEADER} is damaged: {error}. Restore the file from a copy, or fit again."
            ) from error

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, n_train={self.n_train}, checkpoints={len(self.checkpoints)})"

    @classmethod
    def create(cls, path: Path, header: TraceHeader) -> Trace:
        """Start an empty trace; one that is there already is removed, and nothing else.

        Raises:
            FileExistsError: if files of others, or links, are in the way.
        """
        require_free(path)
        remove_trace(path)
        path.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        write_json(path / HEADER, {**content, **asdict(header)})
        return cls(path)

    def branch(self, path: Path, step: int) -> Trace:
        """Start a trace in another folder with what this one had up to a step; this one stays as it is.

        Raises:
            FileExistsError: if files of others, or links, are in the way.
        """
        require_free(path)
        remove_trace(path)
        path.mkdir(parents=True, exist_ok=True)
        header = read_json(self.path / HEADER)
        write_json(path / HEADER, {**header, "id": uuid.uuid4().hex, "branched_from": self.id, "incomplete": None})
        copy_before(self.path, path, step)
        return Trace(path)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, in the order of the fit; read from the folder each time."""
        files = sorted(self.path.glob("checkpoints/*/checkpoint.json"))
        return [self.read_checkpoint(file) for file in files if file.parent.suffix != PARTIAL]

    @property
    def has_texts(self) -> bool:
        """Whether the training examples' token ids and labels are stored: from the first caching on."""
        return bool(self._texts())

    def texts(self, examples: Sequence[int]) -> Texts:
        """Token ids and labels of some training examples, each asked for once, in the order given.

        Of an example that training has not come upon yet there is nothing.
        """
        blocks, places = [Texts.empty(0)], []
        missing = torch.arange(len(examples))
        for stored in self._texts():
            read: Texts = stored.read_examples([examples[place] for place in missing.tolist()])
            known = torch.isin(torch.arange(len(missing)), read.examples) | ~torch.isnan(read.labels)
            blocks.append(read)
            places.append(torch.where(known, missing, -1))
            missing = missing[~known]
            if not len(missing):
                break
        return Texts.cat(blocks).arranged(torch.cat([missing[:0], *places]), len(examples))

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """What to print for the token ids that occur in the training set."""
        path = self.path / "vocabulary.json"
        return {int(token): word for token, word in read_json(path).items()} if path.exists() else {}

    def add_words(self, words: Mapping[int, str], processes: Processes = ALONE) -> None:
        """Keep what to print for token ids, as each of the processes knows it."""
        known = dict(self.vocabulary)
        for own in processes.gather(dict(words)):
            known |= own
        if processes.first:
            write_json(self.path / "vocabulary.json", known)
        self.__dict__.pop("vocabulary", None)

    def check_counts(self, shards: Shards) -> None:
        """Check that shards hold as many examples as the trace has, in as many files.

        Raises:
            ValueError: if they do not.
        """
        found, expected = (shards.n_examples, shards.shard_examples), (self.n_train, self.shard_examples)
        if found != expected or len(shards.checksums) != len(shards):
            raise ValueError(
                f"{shards.folder / 'index.json'} is damaged: it counts {found[0]} examples in {len(shards.checksums)} "
                f"shards of {found[1]}, but the trace has {expected[0]} in shards of {expected[1]}. Restore the file "
                "from a copy, or fit again; of gradients it is enough to remove the folder."
            )

    def read_checkpoint(self, file: Path) -> Checkpoint:
        """The checkpoint that a file describes.

        Raises:
            ValueError: if the file is damaged.
        """
        keys = [each.name for each in fields(Checkpoint) if each.name not in ("path", "sites")]
        return Checkpoint(path=file.parent, sites=self.sites, **read_json(file, keys))

    def _texts(self) -> list[Shards]:
        """The stored texts: of the whole training set, or of what was trained on up to each checkpoint."""
        folders = [self.path / "texts", *sorted(self.path.glob("checkpoints/*/texts"))]
        return [Shards.open(folder) for folder in folders if (folder / "index.json").exists()]

    def check_model(self, state: Mapping[str, Any], model_class: str) -> None:
        """Check that a module is the one that was trained: the same parameters of the same shapes.

        Args:
            state: the module's state dict.
            model_class: the name of its class.

        Raises:
            ValueError: if it is not; the message names parameters that differ.
        """
        if model_fingerprint(state) == self.model_fingerprint:
            return
        own = _shapes(state)
        recorded = _shapes(self.checkpoints[0].weights()) if self.checkpoints else {}
        differing = sorted(name for name in own.keys() | recorded.keys() if own.get(name) != recorded.get(name))
        raise ValueError(
            f"The trace in {self.path} is of another model ({self.model_class}) than {model_class}: "
            f"{len(differing)} parameters differ in name or shape, such as "
            + "; ".join(f"{name}: {recorded.get(name)} in the trace, {own.get(name)} here" for name in differing[:3])
            + "."
        )

    def check_in_place(self) -> None:
        """Check that the folder still holds this trace.

        Raises:
            FileNotFoundError: if it holds none.
            ValueError: if it holds another.
        """
        if Trace(self.path).id != self.id:
            raise ValueError(f"Another fit has replaced the trace in {self.path}; pass that folder to use its trace.")

    def check_data(self, n_train: int, fingerprint: str) -> None:
        """Check that a training set is the one that was trained on.

        Raises:
            ValueError: if it has another number of examples, or other examples.
        """
        if (n_train, fingerprint) == (self.n_train, self.data_fingerprint):
            return
        difference = (
            f"it had {self.n_train} examples, this one has {n_train}"
            if n_train != self.n_train
            else "the examples, or their order in the data set, differ"
        )
        raise ValueError(
            f"The trace in {self.path} is of another training set: {difference}. Pass the data set of the fit, in its "
            "order, or fit again."
        )

    def check_whole(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Check that no checkpoint is missing: each names the one before.

        Raises:
            FileNotFoundError: if one is.
        """
        before: str | None = None
        for checkpoint in checkpoints:
            if checkpoint.previous != before:
                raise FileNotFoundError(
                    f"The trace in {self.path} lacks the checkpoint before that of step {checkpoint.step}: its folder "
                    "was removed. Scores without it would be wrong. Restore the folder from a copy, or fit again."
                )
            before = checkpoint.id

    def mark_incomplete(self, step: int, why: str) -> None:
        """Keep in the header that the recording ended before the fit did, at a step and for a reason.

        Raises:
            OSError: if it cannot be written.
            ValueError: if another trace is in the folder.
        """
        self.check_in_place()
        self.incomplete = f"The recording ended at step {step}: {why}"
        write_json(self.path / HEADER, {**read_json(self.path / HEADER), "incomplete": self.incomplete})

    def drop_checkpoints_after(self, step: int) -> None:
        """Remove the checkpoints beyond a step, when a fit is resumed from an earlier one."""
        for checkpoint in self.checkpoints:
            if checkpoint.step > step:
                remove_folder(self.path, checkpoint.path)


def model_fingerprint(state: Mapping[str, Any]) -> str:
    """A hash of the names and shapes of a state dict's tensors."""
    return hashlib.sha256(repr(sorted(_shapes(state).items())).encode()).hexdigest()


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
