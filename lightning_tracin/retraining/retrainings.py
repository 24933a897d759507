"""Retrainings: runs the fits that are asked for, once each, and keeps what they gave."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tracin.bridge.fingerprint import fingerprint_of, fingerprint_of_all
from lightning_tracin.bridge.looks import look_of
from lightning_tracin.checked_numbers import whole_number, whole_numbers
from lightning_tracin.retraining.distinct_fits import DistinctFits, hash_of_weights
from lightning_tracin.retraining.fits import Build, Fit, apart, built, checked_fit, fitted, memory_freed
from lightning_tracin.retraining.folder import Retraining, RetrainingFolder
from lightning_tracin.retraining.held_out import held_out
from lightning_tracin.retraining.observed import Observed
from lightning_tracin.retraining.outcomes import Outcome, Outcomes
from lightning_tracin.retraining.subsets import checked_subsets

_LARGEST_SEED = 2**32 - 1  # that numpy takes
_FEW = 64  # training examples that are looked at first, and that folders of earlier versions know theirs by
_WAIT = 0.5  # seconds between two looks at what other processes have finished


class Retrainings:
    """Fits on parts of a training set, kept in a folder, each of which is run once.

    A fit that is there is not run again, and a process that is killed loses the one that it was at. Several processes
    may work on one folder: each takes a fit that no other one is at. Random numbers of the caller stay as they are.

    Args:
        folder: where they are kept; it is made if it is missing.
        build: ``build(indices, seed)`` returns a module, freshly initialised by the seed, and the loader of the
            training examples with these indices, in ascending order.
        test: the loader of the test examples, which have labels, or a data set, which is put into batches as the
            training examples are; or several in a list or a mapping, one after the other.
        n_train: number of training examples.
        trainer: a number of epochs, for a quiet trainer on one device, or a function that makes a new trainer for each
            fit.

    Raises:
        TypeError: if the test examples come in something else, or ``trainer`` is neither.
        ValueError: if there are no training or test examples, or no epochs.

    Example::

        def build(indices, seed):
            return Classifier(), DataLoader(Subset(data, indices), batch_size=32, shuffle=True)

        halves = random_halves(len(data), 100)
        found = Retrainings("halves", build, test_loader, n_train=len(data), trainer=4).run(halves, seeds=(0, 1))
        found.losses  # (100, 2, n_test)
    """

    def __init__(self, folder: str | Path, build: Build, test: Any, *, n_train: int, trainer: Fit) -> None:
        if not callable(build):
            raise TypeError(f"build must be a function of (indices, seed), but got {type(build).__name__}.")
        self.n_train = whole_number("n_train", n_train, at_least=2)
        self._fit = checked_fit(trainer)
        self.folder = RetrainingFolder(folder)
        self._build = build
        self.held_out = held_out(test, lambda: self.built_on_few[1])
        self.n_test = len(self.held_out)
        self._observed = Observed(self.held_out)
        self._distinct = DistinctFits()
        self._task: dict[str, Any] = {"n_train": self.n_train, "n_test": self.n_test, "test": self.held_out.fingerprint}

    @cached_property
    def built_on_few(self) -> tuple[pl.LightningModule, DataLoader[Any]]:
        """A module that is not trained, and a loader of a few training examples."""
        return self._built(list(range(0, self.n_train, max(1, self.n_train // _FEW)))[:_FEW])

    @property
    def built_on_all(self) -> tuple[pl.LightningModule, DataLoader[Any]]:
        """A module that is not trained, and a loader of all training examples."""
        return self._built(list(range(self.n_train)))

    @cached_property
    def loader_of_all(self) -> DataLoader[Any]:
        """The loader of :attr:`built_on_all`, built once."""
        return self.built_on_all[1]

    def _built(self, indices: list[int]) -> tuple[pl.LightningModule, DataLoader[Any]]:
        with apart():
            return built(self._build, indices, 0, self.n_train)

    def missing(self, subsets: Tensor, seeds: Sequence[int] = (0,)) -> int:
        """How many fits :meth:`run` would run.

        Args:
            subsets: (m, n_train) or (n_train,) bool, True for the training examples that are kept.
            seeds: with each of which a fit is run on each subset.
        """
        asked = _asked(checked_subsets(subsets, self.n_train), _checked_seeds(seeds))
        return sum(not self.folder.has(each) for each in asked)

    def run(self, subsets: Tensor, seeds: Sequence[int] = (0,)) -> Outcomes:
        """Fit on each of some subsets with each of some seeds, as far as that has not been done.

        The first seed comes first, on all subsets.

        Args:
            subsets: (m, n_train) or (n_train,) bool, True for the training examples that are kept.
            seeds: with each of which a fit is run on each subset.

        Returns:
            What the modules say of the test examples.

        Raises:
            TypeError: if ``build`` takes or returns something else.
            ValueError: if the folder holds retrainings of another task, if subsets are none of this training set, or if
                what is trained on does not depend on the indices.
        """
        subsets, seeds = checked_subsets(subsets, self.n_train), _checked_seeds(seeds)
        found = self.run_each(_asked(subsets, seeds))
        m = len(subsets)
        return Outcomes.of(subsets, seeds, [found[number::m] for number in range(m)])

    def run_each(self, asked: Sequence[Retraining]) -> list[Outcome]:
        """Run single retrainings, as far as that has not been done, in their order.

        Args:
            asked: subsets, each with the seed that goes with it.

        Raises:
            TypeError: as :meth:`run`.
            ValueError: as :meth:`run`.
        """
        self.folder.check(self._task)
        left = list({each.key: each for each in asked if not self.folder.has(each)}.values())
        if left or self.folder.header is not None:
            self._know_whole_task()
            self.folder.claim(self._task)
        if left:
            self._run_all(left, [each for each in asked if self.folder.has(each)])
        return [self.folder.read(each) for each in asked]

    def _know_whole_task(self) -> None:
        """Look at what is built: the training set and the module, which tell one task from another."""
        if "module" in self._task:
            return
        module, loader = self.built_on_few
        train, _ = fingerprint_of(loader, look_of)
        n_weights = sum(each.numel() for each in module.parameters())
        fit = f"{self._fit} epochs" if isinstance(self._fit, int) else "a trainer of your own"
        examples = fingerprint_of_all(self.loader_of_all)
        self._task |= {
            "train": train,
            "examples": examples,
            "module": f"a {type(module).__name__} of {n_weights} weights",
            "fit": fit,
        }

    def _run_all(self, left: list[Retraining], done: list[Retraining]) -> None:
        """Run what is left, and wait for what other processes are at."""
        rank_zero_info(f"{len(left)} retrainings to run, into {self.folder.path}; {len(done)} are there.")
        for each in done:
            self._compare(each, self.folder.read(each))
        is_told = False
        with _progress(len(left)) as advance, memory_freed() as free:
            while left:
                n_left, started = len(left), time.monotonic()
                for each in list(left):
                    state = self._take(each)
                    if state == "busy":
                        continue
                    left.remove(each)
                    advance()
                    if state == "run":
                        free()
                        if not is_told:
                            _say_time(time.monotonic() - started, n_left)
                        is_told = True
                if len(left) == n_left:
                    time.sleep(_WAIT)

    def _take(self, retraining: Retraining) -> Literal["run", "there", "busy"]:
        """Run a retraining, unless it is there, or another process is busy with it."""
        with self.folder.taken(retraining) as is_mine:
            is_there = self.folder.has(retraining)
            if not is_mine and not is_there:
                return "busy"
            outcome = self.folder.read(retraining) if is_there else self._run(retraining)
            self._compare(retraining, outcome)
            if not is_there:
                self.folder.write(retraining, outcome)
        return "there" if is_there else "run"

    def _run(self, retraining: Retraining) -> Outcome:
        """Run one retraining."""
        indices = retraining.kept.nonzero().flatten().tolist()
        with apart():
            module, loader = built(self._build, indices, retraining.seed, self.n_train)
            trainer = fitted(self._fit, module, loader)
            weights = hash_of_weights(module)
            outcome = self._observed.outcome(trainer, module)
        return replace(outcome, weights=weights)

    def _compare(self, retraining: Retraining, outcome: Outcome) -> None:
        """Check that a fit depends on what it was trained on, and warn if it does not on its seed.

        Raises:
            ValueError: if it is, bit for bit, the same as on other training examples; that one is forgotten.
        """
        other = self._distinct.add(retraining, outcome)
        if other is None:
            return
        self.folder.remove(other)
        raise ValueError(
            f"Two retrainings on different training examples ({int(other.kept.sum())} and "
            f"{int(retraining.kept.sum())} of {self.n_train}) ended with the very same weights: what "
            "build(indices, seed) trains on does not depend on its indices, or nothing is trained, or the trainer "
            "stops before it has drawn what differs."
        )


def _asked(subsets: Tensor, seeds: Sequence[int]) -> list[Retraining]:
    """Each subset with the first seed, then with the second, and so on."""
    return [Retraining(kept, seed) for seed in seeds for kept in subsets]


def _checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds as Python's own numbers.

    Raises:
        ValueError: if there is no seed, one occurs twice, or one is no seed.
    """
    numbers = whole_numbers("seeds", seeds, 0, _LARGEST_SEED)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must be different whole numbers from 0 to {_LARGEST_SEED}, but got {list(numbers)}.")
    return numbers


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar with the time that is left, in a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("Retraining"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=600) as progress:
        task = progress.add_task("Retraining", total=total)
        yield lambda: progress.advance(task)


def _say_time(took: float, n: int) -> None:
    """Say after the first retraining how long all of them take."""
    rank_zero_info(f"The first retraining took {took:.1f} s, all {n} take this process about {_duration(took * n)}.")


def _duration(seconds: float) -> str:
    """A time in words.

    Example:
        >>> _duration(95), _duration(2000), _duration(9000)
        ('95 s', '33 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
