"""The folder of retrainings: one file of JSON that says of what they are, and one of safetensors for each of them.

::

    retrainings.json      format, n_train, n_test, and what the training set, the test set and the module are known by
    <key>.safetensors     kept (n_train,) uint8, losses (n_test,), log_probabilities (n_test, n_classes) if there are
                          classes; the seed, a checksum of all that, and a hash of the fit's weights, in its metadata
    <key>.lock            while a process runs that retraining

Files appear whole, so that a process that is killed loses the retraining that it was at, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lightning_tracin.checked_numbers import whole_numbers
from lightning_tracin.gradients.printable import printable
from lightning_tracin.retraining.outcomes import Outcome, Outcomes
from lightning_tracin.storage.files import (
    damage_named,
    hash_of_tensors,
    open_tensors,
    read_json,
    status_of,
    write_json,
    write_tensors,
)
from lightning_tracin.storage.layouts import Form, require_forms, require_within
from lightning_tracin.storage.lock import NO_LOCKS
from lightning_tracin.storage.schemas import Size

_HEADER = "retrainings.json"
_FORMAT = 1
_REPAIR = "Remove it, and run it again."
_ROUNDING = 1e-3  # by which the logarithm of a probability may be above 0

# What of a header tells another task, and how to name it.
_TOLD = {
    "n_train": "its training set has {} examples, this one {}",
    "n_test": "its test set has {} examples, this one {}",
    "test": "its test examples are others",
    "train": "its training examples are others",
    "examples": "some of its training examples, or of their labels, are others",
    "module": "its module is {}, this one {}",
    "fit": "its fits are of {}, these of {}",
}
_LATER = {"examples"}  # what headers of earlier versions lack


class _Sizes(msgspec.Struct, frozen=True):
    """What of the header the files of retrainings are checked by."""

    n_train: Size
    n_test: Size


@dataclass(frozen=True, eq=False)
class Retraining:
    """One fit: on which training examples, and with which seed.

    Attributes:
        kept: (n_train,) bool, True for the training examples that are kept.
        seed: of the fit's random numbers.
    """

    kept: Tensor
    seed: int

    @cached_property
    def key(self) -> str:
        """What its file is named by."""
        return hash_of_tensors({"kept": self.kept}, str(self.seed))[:20]


class RetrainingFolder:
    """Reads and writes a folder of retrainings.

    Args:
        path: the folder; it is made when something is written to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._n_classes: int | None = None  # as the files say that were read

    @property
    def header(self) -> dict[str, Any] | None:
        """What the retrainings are of; None of a folder without any.

        Raises:
            ValueError: if the file is damaged, or of a later version.
        """
        if not (self.path / _HEADER).exists():
            return None
        header = read_json(self.path / _HEADER)
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{self.path} holds retrainings in the format {header.get('format')!r}, but this version reads "
                f"{_FORMAT}. Read it with the version that wrote it, or choose another folder."
            )
        _sizes_of(header, self.path / _HEADER)
        return header

    def claim(self, task: dict[str, Any]) -> None:
        """Make the folder one of this task's, or check that it is.

        Args:
            task: what the retrainings are of: all entries of a header.

        Raises:
            ValueError: if it holds retrainings of another task.
        """
        self.check(task)
        if self.header is None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / _HEADER, {"format": _FORMAT, **task})

    def check(self, task: dict[str, Any]) -> None:
        """Check that the folder holds no retrainings of another task.

        Args:
            task: what the retrainings are of: some or all entries of a header.

        Raises:
            ValueError: if it does.
        """
        header = self.header
        if header is None:
            return
        known = {name: header.get(name) for name in _TOLD if name in header or name not in _LATER}
        other = next((name for name in known if name in task and task[name] != known[name]), None)
        if other is not None:
            told = _TOLD[other].format(header.get(other), task[other])
            raise ValueError(
                f"{self.path} holds retrainings of another task: {printable(told)}. Choose another folder."
            )

    def has(self, retraining: Retraining) -> bool:
        """Whether a retraining is there."""
        return self._file(retraining).exists()

    def write(self, retraining: Retraining, outcome: Outcome) -> None:
        """Keep what a retraining gave.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {"kept": retraining.kept.to(torch.uint8), "losses": outcome.losses}
        if outcome.log_probabilities is not None:
            tensors["log_probabilities"] = outcome.log_probabilities
        seed = str(retraining.seed)
        metadata = {"seed": seed, "content": hash_of_tensors(tensors, seed)}
        metadata |= {} if outcome.weights is None else {"weights": outcome.weights}
        write_tensors(self._file(retraining), tensors, metadata)

    def read(self, retraining: Retraining) -> Outcome:
        """What a retraining gave.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if its file is damaged, or of another retraining.
        """
        return self._read(self._file(retraining), self._sizes)[1]

    def remove(self, retraining: Retraining) -> None:
        """Forget a retraining, which was found to be wrong."""
        self._file(retraining).unlink(missing_ok=True)

    def all(self) -> dict[int, dict[str, tuple[Tensor, Outcome]]]:
        """All that is there, by seed and by a key of the subset: the examples that were kept, and the outcome.

        Raises:
            FileNotFoundError: if there are no retrainings.
            ValueError: if a file is damaged.
        """
        found: dict[int, dict[str, tuple[Tensor, Outcome]]] = {}
        sizes = self._sizes
        for path in sorted(self.path.glob("*.safetensors")):
            retraining, outcome = self._read(path, sizes)
            of_subset = Retraining(retraining.kept, 0).key
            found.setdefault(retraining.seed, {})[of_subset] = (retraining.kept, outcome)
        return found

    @contextmanager
    def taken(self, retraining: Retraining) -> Iterator[bool]:
        """Whether this process may run a retraining, which then no other process may, as long as the context lasts.

        The operating system gives it free when the process is killed. On a file system without locks several processes
        may run the same retraining, which wastes time and harms nothing.
        """
        lock = FileLock(self._file(retraining).with_suffix(".lock"), timeout=0, fallback_to_soft=False)
        is_locked = False
        try:
            lock.acquire()
            is_locked = True
        except Timeout:
            yield False
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        try:
            yield True
        finally:
            if is_locked:
                with suppress(OSError):
                    Path(lock.lock_file).unlink()
            lock.release()

    def _file(self, retraining: Retraining) -> Path:
        return self.path / f"{retraining.key}.safetensors"

    @property
    def _sizes(self) -> _Sizes:
        """What the header says of the files.

        Raises:
            FileNotFoundError: if there is none.
        """
        header = self.header
        if header is None:
            raise FileNotFoundError(f"{self.path} holds no retrainings: there is no {_HEADER} in it.")
        return _sizes_of(header, self.path / _HEADER)

    def _read(self, path: Path, sizes: _Sizes) -> tuple[Retraining, Outcome]:
        status_of(path)
        tensors, metadata = open_tensors(path)
        with damage_named(path, _REPAIR):
            seed = metadata.get("seed", "")
            if metadata.get("content") != hash_of_tensors(tensors, seed) or not seed.isdecimal():
                raise ValueError("its content is not what was written")
            _check(tensors, sizes, self._n_classes)
            retraining = Retraining(tensors["kept"].bool(), int(seed))
            if retraining.key != path.stem:
                raise ValueError(f"it is of another retraining, {retraining.key}, than its name says")
        said = tensors.get("log_probabilities")
        if said is not None:
            self._n_classes = said.shape[1]
        return retraining, Outcome(
            tensors["losses"].clone(), None if said is None else said.clone(), metadata.get("weights")
        )


def _sizes_of(header: Mapping[str, Any], path: Path) -> _Sizes:
    with damage_named(path, "Restore the file from a copy, or choose another folder."):
        return msgspec.convert(header, _Sizes)


def _check(tensors: Mapping[str, Tensor], sizes: _Sizes, n_classes: int | None) -> None:
    """Check the tensors of a retraining's file, before anything in them is used.

    Args:
        tensors: by name.
        sizes: what the header says.
        n_classes: of the other files; None where that is not known.

    Raises:
        ValueError: if they have other names, types, shapes or ranges.
    """
    forms: dict[str, Form] = {"kept": (torch.uint8, (sizes.n_train,)), "losses": (torch.float32, (sizes.n_test,))}
    if "log_probabilities" in tensors:
        forms["log_probabilities"] = (torch.float32, (sizes.n_test, "n_classes" if n_classes is None else n_classes))
    require_forms(tensors, forms)
    require_within("kept", tensors["kept"], 0, 1)
    require_within("losses", tensors["losses"], -math.inf, math.inf)
    if "log_probabilities" in tensors and bool((tensors["log_probabilities"] > _ROUNDING).any()):
        raise ValueError("log_probabilities holds numbers above 0")


def stored_outcomes(folder: str | Path, seeds: Sequence[int] | None = None) -> Outcomes:
    """What retrainings gave that lie in a folder: those of all subsets that were retrained on with each of the seeds.

    Args:
        folder: that retrainings were written to.
        seeds: those that count; by default all that occur there.

    Returns:
        Subsets (m, n_train) in an order that does not change, and what modules said that were retrained on them.

    Raises:
        FileNotFoundError: if there are no retrainings in the folder.
        ValueError: if there are no subsets with all of these seeds, or if a file is damaged.
    """
    found = RetrainingFolder(folder).all()
    asked = tuple(sorted(found)) if seeds is None else whole_numbers("seeds", seeds, at_least=0)
    common = sorted(set.intersection(*(set(found.get(seed, {})) for seed in asked))) if asked else []
    if not common:
        raise ValueError(
            f"{folder} holds no subset that was retrained on with each of the seeds {list(asked)}. There are "
            f"{ {seed: len(each) for seed, each in found.items()} } retrainings by seed."
        )
    subsets = torch.stack([found[asked[0]][key][0] for key in common])
    return Outcomes.of(subsets, asked, [[found[seed][key][1] for seed in asked] for key in common])
