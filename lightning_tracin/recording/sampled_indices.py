"""Which examples a training batch holds: the indices that the loader's own sampler yields, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_tracin.bridge.compat import on_training_loader
from lightning_tracin.bridge.own_batches import StandIn

_USE = 'Use cache="checkpoint", which reads the training set by itself.'


class SampledIndices(StandIn):
    """Stands in for a loader's batch sampler, and remembers what it yields.

    A ``DataLoader`` delivers batches in the order in which it asked for them, however many workers prefetch, so the
    batch that comes next is the first one that is remembered.

    Args:
        loader: the loader that a fit is about to iterate. Call :meth:`restore` to give it its own sampler back.

    Raises:
        ValueError: if the indices of its batches cannot be known.
    """

    def __init__(self, loader: Any) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            kind = type(loader.dataset).__name__ if isinstance(loader, DataLoader) else type(loader).__name__
            raise ValueError(
                f'cache="training" must know which examples a batch holds, but a {kind} has no sampler. {_USE}'
            )
        if not getattr(loader, "in_order", True):
            raise ValueError(f'cache="training" needs a DataLoader with in_order=True. {_USE}')
        place = "sampler" if loader.batch_sampler is None else "batch_sampler"
        own: Any = getattr(loader, place)
        if place == "sampler" and not isinstance(own, BatchSampler):
            raise ValueError(f"The training DataLoader does not batch (batch_size=None). {_USE}")
        n_examples = len(loader.dataset)  # type: ignore[arg-type]
        ours = {"loader": loader, "own": own, "_place": place, "_n_examples": n_examples, "_yielded": deque()}
        self.__dict__.update(ours)  # what others set is their sampler's
        object.__setattr__(loader, place, self)  # the loader itself refuses a new sampler

    def __iter__(self) -> Iterator[list[int]]:
        yielded: deque[list[int]] = deque()  # without what an epoch that was cut short has left
        self.__dict__["_yielded"] = yielded
        return self._remembered(iter(self.own), yielded)

    def __len__(self) -> int:
        return len(self.own)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # not there yet
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)

    def next_batch(self) -> list[int]:
        """The data set indices of the batch that comes next.

        Raises:
            ValueError: if the loader has delivered a batch that its sampler did not ask for.
        """
        yielded: deque[list[int]] = self._yielded
        with suppress(IndexError):
            return yielded.popleft()
        raise ValueError(f"The training loader gave a batch that its sampler had not asked for. {_USE}")

    def restore(self) -> None:
        """Give the loader its own sampler back."""
        if getattr(self.loader, self._place) is self:
            object.__setattr__(self.loader, self._place, self.own)

    def _remembered(self, batches: Iterator[Any], yielded: deque[list[int]]) -> Iterator[Any]:
        for batch in batches:
            yielded.append([int(index) % self._n_examples for index in batch])  # -1 is the last one
            yield batch


class SampledLoader:
    """Watches the loader that a fit reads, through reloads, for the indices of its batches.

    Args:
        trainer: the trainer whose fit it is, before Lightning has given its loader a sampler.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._sampled: SampledIndices | None = None
        on_training_loader(trainer, self._see)

    def next_batch(self) -> list[int]:
        """The data set indices of the batch that comes next.

        Raises:
            ValueError: if the loader has delivered a batch that its sampler did not ask for.
        """
        return [] if self._sampled is None else self._sampled.next_batch()

    def close(self) -> None:
        """Leave the loader as it was."""
        on_training_loader(self._trainer, None)
        if self._sampled is not None:
            self._sampled.restore()

    def _see(self, loader: Any) -> None:
        if self._sampled is not None:
            if self._sampled.loader is loader:
                return  # a reload may give the same one again
            self._sampled.restore()
        self._sampled = SampledIndices(loader)
