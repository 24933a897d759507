"""Which examples a training batch holds: the indices that the loader's own sampler yields, batch by batch."""

from __future__ import annotations

import copy
import gc
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_tracin.bridge.compat import training_iteration, watch_training_loader
from lightning_tracin.bridge.own_batches import StandIn, numbers_of

_USE = 'Use cache="checkpoint", which reads the training set by itself.'


def why_not_known(loader: Any) -> str | None:
    """Why the indices of a loader's batches cannot be known, in a sentence; None if they can."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset).__name__ if isinstance(loader, DataLoader) else type(loader).__name__
        return f'cache="training" must know which examples a batch holds, but a {kind} has no sampler.'
    if not getattr(loader, "in_order", True):
        return 'cache="training" needs a DataLoader with in_order=True.'
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler):
        return "The training DataLoader does not batch (batch_size=None)."
    return None


class SampledIndices(StandIn):
    """Stands in for a loader's batch sampler, and remembers what it yields, apart for each iteration of the loader.

    A ``DataLoader`` delivers batches in the order in which it asked for them, however many workers prefetch, so the
    batch that comes next is the first one that is remembered of an iteration.

    Args:
        loader: the loader that a fit is about to iterate, whose indices can be known. Call :meth:`restore` to give it
            its own sampler back.
    """

    _kind: Any = None  # of the own sampler; each has a class of its own here

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """A stand-in; by the class of one, ``type(batch_sampler)(sampler, ...)``, what the own sampler's class makes.

        So Lightning makes a batch sampler anew, for a ``predict`` with the training loader inside a fit.
        """
        if cls._kind is not None:
            return cls._kind(*arguments, **options)
        kind = type(getattr(arguments[0], _place(arguments[0])))
        return super().__new__(type(kind.__name__, (cls,), {"_kind": kind}))

    def __init__(self, loader: Any) -> None:
        place, n_examples = _place(loader), len(loader.dataset)
        own: Any = getattr(loader, place)
        ours = {"loader": loader, "own": own, "_place": place, "_n_examples": n_examples}
        ours |= {"_latest": None, "ended": None, "_skipping": (None, None)}
        self.__dict__.update(ours)  # what others set is their sampler's
        object.__setattr__(loader, place, self)  # the loader itself refuses a new sampler
        _ask(loader, instead_of=own, sampler=self)

    if not TYPE_CHECKING:

        @property
        def __class__(self) -> type:  # isinstance() finds the sampler's own class; but this is no list of batches
            own: type = self.own.__class__
            return type(self) if own.__module__ == "builtins" else own

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.own)
        kind = _ResumableIteration if hasattr(batches, "load_state_dict") else _Iteration
        iteration = kind(self, batches)  # without what an epoch that was cut short has left
        self.__dict__["_latest"] = iteration
        return iteration

    def __len__(self) -> int:
        return len(self.own)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # not there yet
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.own, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:  # of copy.copy and pickle
        return copy.copy, (self.own,)

    def next_batch(self, iteration: object | None = None, ahead: int | None = None) -> list[int]:
        """The data set indices of the batch that comes next.

        Args:
            iteration: of the loader's sampler, whose batch it is; by default the one that was begun last.
            ahead: how many batches it was asked for after this one. What it gave before is passed over: a loader that
                goes on inside an epoch (torchdata's) skips batches, or reads them again and drops them.

        Raises:
            ValueError: if the loader has delivered a batch that its sampler did not ask for, or one with examples that
                its data set did not have.
        """
        read = self._latest if iteration is None else self._ours(iteration)
        if read is not None:
            while ahead is not None and len(read.yielded) > ahead + 1:
                read.yielded.popleft()
            with suppress(IndexError):
                return numbers_of(read.yielded.popleft(), self._n_examples)
        raise ValueError(f"The training loader gave a batch that its sampler had not asked for. {_USE}")

    def _ours(self, iteration: object) -> _Iteration | None:
        """This stand-in's iteration in what a loader asks for indices; None if there is none."""
        if isinstance(iteration, islice):  # by which torchdata skips; it does not tell of what it is
            known, found = self._skipping
            if known is not iteration:
                found = next((each for each in gc.get_referents(iteration) if isinstance(each, _Iteration)), self.ended)
                self.__dict__["_skipping"] = iteration, found
            iteration = found
        while isinstance(iteration, _Iteration) and iteration.of is not self:
            iteration = iteration.batches  # another callback's stand-in has ours as its own sampler
        return iteration if isinstance(iteration, _Iteration) else None

    def restore(self) -> None:
        """Give the loader its own sampler back, also where another callback has put its stand-in before this one."""
        outer = getattr(self.loader, self._place)
        if outer is self:
            object.__setattr__(self.loader, self._place, self.own)
            _ask(self.loader, instead_of=self, sampler=self.own)
        while isinstance(outer, SampledIndices):
            if outer.own is self:
                outer.__dict__["own"] = self.own
            outer = outer.own


class _Iteration:
    """One iteration of a sampler's batches, with those that the loader has asked for and not yet delivered."""

    def __init__(self, of: SampledIndices, batches: Iterator[Any]) -> None:
        self.of = of
        self.batches = batches
        self.yielded: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self.batches)
        except StopIteration:
            self.of.__dict__["ended"] = self  # workers were asked ahead: an islice then lets go of it
            raise
        self.yielded.append(batch.tolist() if hasattr(batch, "tolist") else list(batch))
        return batch


class _ResumableIteration(_Iteration):
    """One that tells where it is and can be put there again, as those of torchdata's ``StatefulDataLoader``."""

    batches: Any

    def state_dict(self) -> Any:
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.batches.load_state_dict(state_dict)
        self.yielded.clear()


def _place(loader: Any) -> str:
    """Which attribute of a loader composes its batches."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def _ask(loader: Any, *, instead_of: Any, sampler: Any) -> None:
    """Let the workers that a loader keeps from an iteration before (``persistent_workers``) be asked by a sampler."""
    kept: Any = getattr(loader, "_iterator", None)
    if getattr(kept, "_index_sampler", None) is instead_of:
        kept._index_sampler = sampler


class SampledLoader:
    """Watches the loader that a fit reads, through reloads, for the indices of its batches.

    Args:
        trainer: the trainer whose fit it is, before Lightning has given its loader a sampler.
        needed: whether a fit that cannot tell them is refused.
    """

    def __init__(self, trainer: pl.Trainer, *, needed: bool) -> None:
        self._trainer = trainer
        self._needed = needed
        self._sampled: SampledIndices | None = None
        self._end = watch_training_loader(trainer, self._see)

    def next_batch(self) -> list[int] | None:
        """The data set indices of the batch that comes next; None if they cannot be known.

        Raises:
            ValueError: if the loader has delivered a batch that its sampler did not ask for.
        """
        return None if self._sampled is None else self._sampled.next_batch(*training_iteration(self._trainer))

    def close(self) -> None:
        """Leave the loader as it was."""
        self._end()
        if self._sampled is not None:
            self._sampled.restore()

    def _see(self, loader: Any) -> None:
        """Watch a loader.

        Raises:
            ValueError: if the indices of its batches are needed, and cannot be known.
        """
        if self._sampled is not None:
            if self._sampled.loader is loader:
                return  # a reload may give the same one again
            self._sampled.restore()
            self._sampled = None
        why = why_not_known(loader)
        if why is None:
            self._sampled = SampledIndices(loader)
        elif self._needed:
            raise ValueError(f"{why} {_USE}")
