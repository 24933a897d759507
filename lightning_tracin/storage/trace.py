"""Trace: the folder that a fit writes, with its checkpoints, gradients, texts and vocabulary.

It contains only JSON and safetensors. Every file, every folder of gradients and every checkpoint is written atomically:
under a name that ends in ``.partial``, and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from lightning_tracin.storage.own_files import (
    FORMAT,
    HEADER,
    copy_before,
    mark_removed,
    remove_folder,
    remove_temporary,
    remove_trace,
    require_free,
    require_only_own,
)
from lightning_tracin.storage.shards import Shards

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TraceHeader:
    """The content of ``trace.json``, which is written before the first checkpoint.

    Attributes:
        n_train: number of training examples.
        data_fingerprint: a hash of the training set.
        model_fingerprint: a hash of the names and shapes of the model's weights.
        model_class: name of the model's class.
        sites: the sites at which gradients are taken, and the form in which they are stored.
        dtype: the type that directions are stored in.
        shard_examples: number of training examples in each shard.
    """

    n_train: int
    data_fingerprint: str
    model_fingerprint: str
    model_class: str
    sites: tuple[Site, ...]
    dtype: Dtype
    shard_examples: int


class Trace:
    """Opens the folder that a fit with :class:`~lightning_tracin.TracInCallback` wrote.

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
        content = read_json(self.path / HEADER, older=True)  # or version 1 would be called damaged
        if content.get("removed"):
            raise FileNotFoundError(
                f"The trace in {self.path.absolute()} was being replaced by that of another fit, which was broken off "
                "before it began. Fit again into this folder, or into another."
            )
        version = content.get("version")
        if isinstance(version, int) and version != FORMAT_VERSION:
            remedy = "Update lightning_tracin, or fit again" if version > FORMAT_VERSION else "Fit again"
            raise ValueError(
                f"The trace in {self.path} is of format version {version}, but this lightning_tracin reads version "
                f"{FORMAT_VERSION}. {remedy}."
            )
        content = read_json(self.path / HEADER, ["version", "id", *(each.name for each in fields(TraceHeader))])
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
        """Create an empty trace; a trace that is already in the folder is removed, and nothing else.

        Args:
            path: the folder.
            header: the content of ``trace.json``.

        Raises:
            FileExistsError: if files of others, or links, are in the way.
        """
        require_free(path)
        remove_trace(path)
        path.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        write_json(path / HEADER, {**content, **asdict(header)})
        remove_temporary(path)
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
        mark_removed(path)  # until all is there: a copy that is broken off is no trace
        copy_before(self.path, path, step)
        write_json(path / HEADER, {**header, "id": uuid.uuid4().hex, "branched_from": self.id, "incomplete": None})
        remove_temporary(path)
        return Trace(path)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, in the order of the fit; they are read from disk at each access."""
        files = sorted(self.path.glob("checkpoints/*/checkpoint.json"))
        found = [self.read_checkpoint(file) for file in files if file.parent.suffix != PARTIAL]
        frozen = {site.key for site in self.sites if not any(checkpoint.moves(site) for checkpoint in found)}
        return [replace(checkpoint, frozen_sites=frozenset(frozen)) for checkpoint in found]

    @property
    def has_texts(self) -> bool:
        """Whether the training examples' token ids and labels are stored, which happens with the first gradients."""
        return bool(self._texts())

    def texts(self, examples: Sequence[int]) -> Texts:
        """The token ids and labels of some training examples, in the given order.

        An example that training has not read yet has no token ids and no label.

        Args:
            examples: distinct indices of training examples.

        Raises:
            ValueError: if a file of the texts is damaged.
        """
        blocks, places = [Texts.empty(0)], []
        missing = torch.arange(len(examples))
        for stored in self._texts():
            block: Texts = stored.read_examples([examples[place] for place in missing.tolist()])
            has_text = torch.isin(torch.arange(len(missing)), block.examples) | ~torch.isnan(block.labels)
            blocks.append(block)
            places.append(torch.where(has_text, missing, -1))
            missing = missing[~has_text]
            if not len(missing):
                break
        return Texts.cat(blocks).arranged(torch.cat([missing[:0], *places]), len(examples))

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """The words of the token ids that occur in the training set."""
        path = self.path / "vocabulary.json"
        stored = read_json(path, ["words"])["words"] if path.exists() else {}
        return {int(token): word for token, word in stored.items()}

    def add_words(self, words: Mapping[int, str], processes: Processes = ALONE) -> None:
        """Add the words of token ids, from every process, to the vocabulary; every process must call it."""
        vocabulary = dict(self.vocabulary)
        for process_words in processes.gather(dict(words)):
            vocabulary |= process_words
        if processes.first:
            write_json(self.path / "vocabulary.json", {"words": vocabulary})
        self.__dict__.pop("vocabulary", None)

    def check_counts(self, shards: Shards) -> None:
        """Check that a folder of shards has the trace's number of examples, in the right number of files.

        Raises:
            ValueError: if a number differs.
        """
        actual, expected = (shards.n_examples, shards.shard_examples), (self.n_train, self.shard_examples)
        if actual != expected or len(shards.checksums) != len(shards):
            raise ValueError(
                f"{shards.folder / 'index.json'} is damaged: it counts {actual[0]} examples in {len(shards.checksums)} "
                f"shards of {actual[1]}, but the trace has {expected[0]} in shards of {expected[1]}. Restore the file "
                "from a copy, or fit again; of gradients it is enough to remove the folder."
            )

    def read_checkpoint(self, file: Path) -> Checkpoint:
        """The checkpoint that a ``checkpoint.json`` describes.

        Raises:
            ValueError: if the file is damaged.
        """
        keys = [each.name for each in fields(Checkpoint) if each.name not in ("path", "sites", "frozen_sites")]
        return Checkpoint(path=file.parent, sites=self.sites, **read_json(file, keys))

    def check_model(self, state: Mapping[str, Any], model_class: str) -> None:
        """Check that a module has the names and shapes of parameters that the trained module had.

        Args:
            state: the module's state dict.
            model_class: name of the module's class, for the message.

        Raises:
            ValueError: if names or shapes differ; the message lists some of them.
        """
        if model_fingerprint(state) == self.model_fingerprint:
            return
        shapes = _shapes(state)
        recorded = _shapes(self.checkpoints[0].weights()) if self.checkpoints else {}
        differing = sorted(name for name in shapes.keys() | recorded.keys() if shapes.get(name) != recorded.get(name))
        raise ValueError(
            f"The trace in {self.path} is of another model ({self.model_class}) than {model_class}: "
            f"{len(differing)} parameters differ in name or shape, such as "
            + "; ".join(f"{name}: {recorded.get(name)} in the trace, {shapes.get(name)} here" for name in differing[:3])
            + "."
        )

    def check_in_place(self) -> None:
        """Check that the folder still holds this trace.

        Raises:
            FileNotFoundError: if the folder has no trace.
            ValueError: if it has another trace.
        """
        if Trace(self.path).id != self.id:
            raise ValueError(f"Another fit has replaced the trace in {self.path}; pass that folder to use its trace.")

    def check_data(self, n_train: int, fingerprint: str) -> None:
        """Check that a training set is the one that was trained on.

        Args:
            n_train: its number of examples.
            fingerprint: its hash.

        Raises:
            ValueError: if the number of examples, or the examples themselves, differ.
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
        """Remove the checkpoints after a step, from which a fit is resumed, and what a killed one has left behind.

        Raises:
            FileExistsError: if somebody keeps files in the folder of such a checkpoint; then nothing is removed.
        """
        dropped = [checkpoint.path for checkpoint in self.checkpoints if checkpoint.step > step]
        require_only_own(self.path, dropped)
        for folder in reversed(dropped):  # so that none is missing between others if this is broken off
            remove_folder(self.path, folder)
        remove_temporary(self.path)

    def _texts(self) -> list[Shards]:
        """The stored texts: of the whole training set, and of the examples that were trained on before a checkpoint."""
        folders = [self.path / "texts", *sorted(self.path.glob("checkpoints/*/texts"))]
        return [Shards.open(folder) for folder in folders if (folder / "index.json").exists()]


def model_fingerprint(state: Mapping[str, Any]) -> str:
    """A hash of the names and shapes of a state dict's tensors."""
    return hashlib.sha256(repr(sorted(_shapes(state).items())).encode()).hexdigest()


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
