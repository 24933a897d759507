"""Trace: the folder that a fit writes, with its checkpoints, gradients, texts and vocabulary.

It contains only JSON and safetensors. Every file, every folder of gradients and every checkpoint is written atomically:
under a name that ends in ``.partial``, and renamed when it is complete.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from lightning_tracin.gradients.printable import storable
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.gradients.sites import Site
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage import schemas
from lightning_tracin.storage.checkpoint import Checkpoint, ever_drawn, undrawn
from lightning_tracin.storage.frozen import remove_unshared
from lightning_tracin.storage.layouts import model_fingerprint, shapes_of
from lightning_tracin.storage.own_files import (
    HEADER,
    copy_before,
    mark_removed,
    remove_folder,
    remove_temporary,
    remove_trace,
    require_free,
    require_only_own,
)
from lightning_tracin.storage.schemas import (
    FORMAT,
    FORMAT_VERSION,
    CheckpointFile,
    TraceFile,
    TraceHeader,
    VocabularyFile,
)
from lightning_tracin.storage.shards import Shards

_STEP = re.compile(r"step-(\d{9})")


class Trace:
    """Opens the folder that a fit with :class:`~lightning_tracin.TracInCallback` wrote.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if there is no trace in the folder.
        NotADirectoryError: if it is a file.
        TypeError: if it is no path.
        ValueError: if another version of lightning_tracin wrote it, or it is damaged.

    Example::

        for checkpoint in Trace("trace").checkpoints:
            print(checkpoint.step, checkpoint.learning_rate)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _folder(path)
        if not (self.path / HEADER).exists():
            raise FileNotFoundError(
                f"There is no trace in {self.path.absolute()}: it holds no {HEADER}. Fit with TracInCallback first, or "
                "pass the folder that it wrote to."
            )
        found = schemas.header_of_any_version(self.path / HEADER)
        if found.removed:
            raise FileNotFoundError(
                f"The trace in {self.path.absolute()} was being replaced by that of another fit, which was broken off "
                "before it began. Fit again into this folder, or into another."
            )
        if found.version not in (0, FORMAT_VERSION):
            remedy = "Update lightning_tracin, or fit again" if found.version > FORMAT_VERSION else "Fit again"
            raise ValueError(
                f"The trace in {self.path} is of format version {found.version}, but this lightning_tracin reads "
                f"version {FORMAT_VERSION}. {remedy}."
            )
        self.header = schemas.read(self.path / HEADER, TraceFile, within=self.path)

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, n_train={self.n_train}, checkpoints={len(self.checkpoints)})"

    @property
    def id(self) -> str:
        """Unique, also if another fit writes to the same folder."""
        return self.header.id

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return self.header.n_train

    @property
    def data_fingerprint(self) -> str:
        """A hash of the training set."""
        return self.header.data_fingerprint

    @property
    def model_fingerprint(self) -> str:
        """A hash of the names and shapes of the model's weights."""
        return self.header.model_fingerprint

    @property
    def model_class(self) -> str:
        """Name of the model's class."""
        return self.header.model_class

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which gradients are taken, and the form in which they are stored."""
        return self.header.sites

    @property
    def dtype(self) -> Dtype:
        """The type that directions are stored in."""
        return self.header.dtype

    @property
    def shard_examples(self) -> int:
        """Number of training examples in each shard."""
        return self.header.shard_examples

    def parts(self) -> list[range]:
        """All training examples, as many at a time as a shard has."""
        step = self.shard_examples
        return [range(start, min(start + step, self.n_train)) for start in range(0, self.n_train, step)]

    @property
    def incomplete(self) -> str | None:
        """Why the recording ended before the fit, if it did."""
        return self.header.incomplete

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
        known = {"format": FORMAT, "version": FORMAT_VERSION, "id": uuid.uuid4().hex}
        schemas.write(path / HEADER, TraceFile(**known, **msgspec.structs.asdict(header)))  # type: ignore[arg-type]
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
        header = schemas.read(self.path / HEADER, TraceFile, within=self.path)
        mark_removed(path)  # until all is there: a copy that is broken off is no trace
        copy_before(self.path, path, step)
        header = msgspec.structs.replace(_recorded_up_to(header, step), id=uuid.uuid4().hex, branched_from=self.id)
        schemas.write(path / HEADER, header)
        remove_temporary(path)
        branched = Trace(path)
        branched._remove_unshared()
        return branched

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, in the order of the fit; they are read from disk at each access."""
        found = [self.read_checkpoint(folder / "checkpoint.json") for folder in self.checkpoint_folders]
        frozen = {site.key for site in self.sites if not any(checkpoint.moves(site) for checkpoint in found)}
        return [replace(checkpoint, frozen_sites=frozenset(frozen)) for checkpoint in found]

    @property
    def undrawn(self) -> Tensor:
        """The indices, int64, of the examples of the training data set that training drew before no checkpoint."""
        return undrawn(self.checkpoints)

    @property
    def checkpoint_folders(self) -> list[Path]:
        """The folders of the complete checkpoints, in the order of the fit; others may lie beside them."""
        files = self.path.glob("checkpoints/*/checkpoint.json")
        return sorted(file.parent for file in files if _STEP.fullmatch(file.parent.name))

    @property
    def has_texts(self) -> bool:
        """Whether token ids and labels of training examples are stored, which happens with their first gradients."""
        return bool(self._texts())

    @property
    def longest_text(self) -> int | None:
        """The number of tokens of the longest training text that is stored; None where none is."""
        shards = [(stored, shard) for stored in self._texts() for shard in range(len(stored)) if stored.holds(shard)]
        return max((int(stored.read(shard).rows_by_example().max()) for stored, shard in shards), default=None)

    def has_texts_of(self, drawn: Tensor | None) -> bool:
        """Whether the token ids and labels of the examples that were drawn, (n_train,) bool, are stored; None: all."""
        if (self.path / "texts" / "index.json").exists():
            return True
        with_texts = [each for each in self.checkpoints if (each.path / "texts" / "index.json").exists()]
        stored = ever_drawn(with_texts)
        if stored is None or drawn is None:
            return bool(with_texts) and stored is None
        return not bool((drawn & ~stored).any())

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

    @property
    def vocabulary(self) -> dict[int, str]:
        """The words of the token ids that occur in the training set."""
        path = self.path / "vocabulary.json"
        if not path.exists():
            return {}
        status = path.stat()
        return _vocabulary(path, self.path, status.st_mtime_ns, status.st_ino, status.st_size)

    def add_words(self, words: Mapping[int, str], processes: Processes = ALONE) -> None:
        """Add the words of token ids, from every process, to the vocabulary; every process must call it."""
        vocabulary = dict(self.vocabulary)
        for process_words in processes.gather(dict(words)):
            vocabulary |= process_words
        if processes.first:
            named = {str(token): storable(str(word)) for token, word in vocabulary.items()}
            schemas.write(self.path / "vocabulary.json", VocabularyFile(words=named))

    def read_checkpoint(self, file: Path) -> Checkpoint:
        """The checkpoint that a ``checkpoint.json`` describes.

        Raises:
            ValueError: if the file is damaged.
        """
        content = schemas.read(file, CheckpointFile, within=self.path)
        named = _STEP.match(file.parent.name)
        if named is None or int(named[1]) != content.step:
            raise ValueError(f"{file} is damaged: it is of step {content.step}. Restore the file from a copy.")
        return Checkpoint.of(file.parent, self.header, content)

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
        shapes = shapes_of(state)
        with_weights = next((each for each in self.checkpoints if each.keeps_weights), None)
        if with_weights is None:
            raise ValueError(
                f"The trace in {self.path} is of another model ({self.model_class}) than {model_class}: the names or "
                "shapes of their parameters differ. It has no weights that could tell which."
            )
        recorded = shapes_of(with_weights.weights())
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
        incomplete = storable(f"The recording ended at step {step}: {why}")
        self.header = msgspec.structs.replace(self.header, incomplete=incomplete, ended_at=step)
        schemas.write(self.path / HEADER, self.header)

    def drop_checkpoints_after(self, step: int) -> None:
        """Remove the checkpoints after a step, from which a fit is resumed, and what a killed one has left behind.

        Raises:
            FileExistsError: if somebody keeps files in the folder of such a checkpoint; then nothing is removed.
        """
        dropped = [checkpoint.path for checkpoint in self.checkpoints if checkpoint.step > step]
        require_only_own(self.path, dropped)
        if self.header != _recorded_up_to(self.header, step):
            self.header = _recorded_up_to(self.header, step)
            schemas.write(self.path / HEADER, self.header)
        for folder in reversed(dropped):  # so that none is missing between others if this is broken off
            remove_folder(self.path, folder)
        remove_temporary(self.path)
        self._remove_unshared()

    def _remove_unshared(self) -> None:
        """Remove files of frozen weights that none of the checkpoints shares."""
        remove_unshared(self.path, {name for checkpoint in self.checkpoints for name in checkpoint.shared})

    def _texts(self) -> list[Shards]:
        """The stored texts: of the whole training set, and of the examples that were trained on before a checkpoint."""
        folders = [self.path / "texts", *(folder / "texts" for folder in self.checkpoint_folders)]
        return [
            Shards.open(folder, within=self.path).checked("texts", self.header)
            for folder in folders
            if (folder / "index.json").exists()
        ]


def _recorded_up_to(header: TraceFile, step: int) -> TraceFile:
    """The header of a trace that is recorded anew from a step on: whole, if the recording had ended later."""
    if header.ended_at is None or header.ended_at <= step:
        return header
    return msgspec.structs.replace(header, incomplete=None, ended_at=None)


def _folder(path: Any) -> Path:
    """The folder of a trace, where one path is given, and not of a file.

    Raises:
        NotADirectoryError: if it is a file.
        TypeError: if it is no path.
    """
    of_checkpoints = "Of checkpoint files of a run that is over, Trace.from_checkpoints makes a trace."
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"A trace is one folder, but got a {type(path).__name__}: {path!r}. Pass the folder that TracInCallback "
            f"wrote, which has all checkpoints of a fit, and ask about several fits one by one. {of_checkpoints}"
        )
    if os.path.isfile(path):  # noqa: PTH113 (never raises)
        raise NotADirectoryError(
            f"A trace is a folder, but {os.fspath(path)} is a file. Pass the folder that TracInCallback wrote. "
            f"{of_checkpoints}"
        )
    return Path(path).expanduser().absolute()  # the working folder may be another one tomorrow, or in the next cell


@lru_cache(maxsize=8)
def _vocabulary(path: Path, folder: Path, *_: int) -> dict[int, str]:
    """The words in a file, read once for each of its versions: another process may add to it at any time."""
    return {int(token): word for token, word in schemas.read(path, VocabularyFile, within=folder).words.items()}


def training_labels(trace: Trace) -> Tensor:
    """(n_train,) float64, the labels of all training examples, NaN where they are not one number; none if not stored.

    Raises:
        ValueError: if a file of the texts is damaged.
    """
    return torch.cat([trace.texts(part).labels for part in trace.parts()]) if trace.has_texts else torch.empty(0)
