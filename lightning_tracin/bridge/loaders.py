"""Data loaders over chosen examples, with the options of a loader that is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

_BATCH_SIZE = 32  # for a batch sampler that does not tell its own


class _InOrder(DistributedSampler[Any]):
    """Some examples. Lightning takes it for a process's own share, and puts no sampler in its place.

    Args:
        dataset: the data set.
        indices: of the examples, or lists of them that are batches.
    """

    def __init__(self, dataset: Any, indices: Sequence[Any]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.indices = indices

    def __iter__(self) -> Iterator[Any]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def loader_over(
    loader: DataLoader[Any], indices: Sequence[int], *, batch_size: int | None = None, **others: Any
) -> DataLoader[Any]:
    """A loader like another, but for some options, over some examples in their order."""
    size = batch_size or _batch_size(loader)
    options = {**loader_options(loader), **others}
    if loader.num_workers:
        options |= {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    if loader.batch_size is None and loader.batch_sampler is None:
        if not isinstance(loader.sampler, BatchSampler):
            raise ValueError(
                "The training DataLoader does not batch (batch_size=None), so its examples cannot be numbered. "
                "Give it a batch_size, or a BatchSampler as its sampler."
            )
        batches = list(BatchSampler(indices, size, drop_last=False))
        return DataLoader(loader.dataset, batch_size=None, sampler=_InOrder(loader.dataset, batches), **options)
    sampler = _InOrder(loader.dataset, indices)
    return DataLoader(loader.dataset, batch_size=size, sampler=sampler, **options)


def _batch_size(loader: DataLoader[Any]) -> int:
    own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return loader.batch_size or getattr(own, "batch_size", None) or _BATCH_SIZE


def loader_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader handles what it has read."""
    return {
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
    }


def only_loader(loaders: Any, kind: str) -> Any:
    """The one loader in what Lightning takes for loaders; that of training must stand there by itself."""
    loaders = getattr(loaders, "iterables", loaders)  # Lightning's CombinedLoader
    container = type(loaders).__name__
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if len(loaders) != 1:
            raise ValueError(
                f"Influence needs one {kind} loader, but got {len(loaders)} of them. Join the data sets "
                "(torch.utils.data.ConcatDataset), so that each example has one number."
            )
        if kind == "training":
            raise ValueError(
                f"The training loader comes in a {container}, so that training_step is given each batch in one too; "
                "influence gives it the batch alone. Pass the loader itself, and let training_step take its batch."
            )
        return loaders[0]
    if loaders is None:
        raise ValueError(f"There is no {kind} loader: pass one.")
    return loaders
