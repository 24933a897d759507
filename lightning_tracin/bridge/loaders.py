"""Data loaders over chosen examples, with the options of a loader that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_tracin.bridge.kept_order import InOrder

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


class _AsListed(BatchSampler):
    """Batches as a sampler lists them; Lightning makes it anew for ``predict``, with the loader's sampler."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


def loader_over(loader: DataLoader[Any], indices: Sequence[int], **others: Any) -> DataLoader[Any]:
    """A loader like another, but for some options, over some examples in their order."""
    if hands_out_batches(loader):
        return loader_of_batches(loader, list(BatchSampler(indices, batch_size_of(loader), drop_last=False)), **others)
    n_batches = -(-len(indices) // batch_size_of(loader))
    options = _all_options(loader, others, n_batches)
    return DataLoader(
        loader.dataset, batch_size=batch_size_of(loader), sampler=_InOrder(loader.dataset, indices), **options
    )


def loader_of_batches(loader: DataLoader[Any], batches: Sequence[Sequence[int]], **others: Any) -> DataLoader[Any]:
    """A loader like another, but for some options, that gives some batches in their order."""
    options = _all_options(loader, others, len(batches))
    sampler = _InOrder(loader.dataset, batches)
    if hands_out_batches(loader):
        return DataLoader(loader.dataset, batch_size=None, sampler=sampler, **options)
    made = DataLoader(loader.dataset, batch_sampler=_AsListed(sampler, 1, drop_last=False), **options)
    object.__setattr__(made, "sampler", sampler)  # torch would let Lightning find one of the whole data set there
    return made


def hands_out_batches(loader: DataLoader[Any]) -> bool:
    """Whether the data set gives whole batches for lists of indices.

    Raises:
        ValueError: if nothing makes such lists.
    """
    if loader.batch_size is not None or loader.batch_sampler is not None:
        return False
    if not isinstance(loader.sampler, (BatchSampler, _InOrder)):
        raise ValueError(
            "The training DataLoader does not batch (batch_size=None), so its examples cannot be numbered. "
            "Give it a batch_size, or a BatchSampler as its sampler."
        )
    return True


def _all_options(loader: DataLoader[Any], others: dict[str, Any], n_batches: int) -> dict[str, Any]:
    options = {**loader_options(loader), **worker_options(loader, n_batches), **others}
    is_own = options["collate_fn"] is loader.collate_fn and not isinstance(loader.collate_fn, InOrder)
    if is_own and not hands_out_batches(loader):
        options["collate_fn"] = InOrder(loader.collate_fn)
    return options


def batches_over(loader: DataLoader[Any], batches: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Batches of chosen examples, read one after the other by one worker, if the loader has any."""
    options = {**loader_options(loader), **worker_options(loader)}
    if loader.batch_size is None and loader.batch_sampler is None:  # its sampler yields batches
        options |= {"batch_size": None, "sampler": _InOrder(loader.dataset, batches)}
    else:
        options |= {"batch_sampler": batches}
    return iter(DataLoader(loader.dataset, **options))


def worker_options(loader: DataLoader[Any], at_most: int = 1) -> dict[str, Any]:
    """The workers that read like a loader's own: none if it has none, and no more than are needed.

    A process whose loaders have workers does not read itself: files that are opened at the first reading, and the
    threads of tokenizers, would not survive that the workers of training are forked after.
    """
    if not loader.num_workers:
        return {"timeout": 0}
    return {
        "num_workers": max(1, min(loader.num_workers, at_most)),
        "prefetch_factor": loader.prefetch_factor,
        "multiprocessing_context": loader.multiprocessing_context,
    }


def items_of(
    loader: DataLoader[Any], indices: Sequence[int], each: Callable[[Any], Any], begin: Callable[[], None]
) -> Iterator[Any]:
    """What a function makes of single examples, read one after the other by one worker, if the loader has any.

    Args:
        loader: of the examples.
        indices: theirs.
        each: the function.
        begin: is called before the first is read, by a worker after it has set itself up.
    """
    options = {**loader_options(loader), **worker_options(loader), "pin_memory": False, "collate_fn": each}
    if loader.num_workers:
        options["worker_init_fn"] = partial(_begin_worker, loader.worker_init_fn, begin)
    return iter(DataLoader(loader.dataset, batch_size=None, sampler=list(indices), **options))


def _begin_worker(own: Callable[[int], None] | None, begin: Callable[[], None], worker: int) -> None:
    if own is not None:
        own(worker)
    begin()


def batch_size_of(loader: DataLoader[Any]) -> int:
    """How many examples a loader puts into a batch; where it does not tell, as many as are usual."""
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


def only_training_loader(loaders: Any) -> Any:
    """The one loader in what Lightning takes for loaders, where it must stand by itself.

    Raises:
        ValueError: if there are several, none, one in a list or dict, or examples without a loader.
    """
    loaders = getattr(loaders, "iterables", loaders)  # Lightning's CombinedLoader
    container = type(loaders).__name__
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if loaders and all(map(_is_example, loaders)):
            raise ValueError(
                f"The training set is a {container} of {len(loaders)} examples. Pass a loader that puts them into "
                "batches, as for the fit: DataLoader(data, batch_size=..., collate_fn=...)."
            )
        if len(loaders) != 1:
            raise ValueError(
                f"Influence needs one training loader, but got {len(loaders)} of them. Join the data sets "
                "(torch.utils.data.ConcatDataset), so that each example has one number."
            )
        raise ValueError(
            f"The training loader comes in a {container}, so that training_step is given each batch in one too; "
            "influence gives it the batch alone. Pass the loader itself, and let training_step take its batch."
        )
    if loaders is None:
        raise ValueError("There is no training loader: pass one.")
    return loaders


def _is_example(part: Any) -> bool:
    """Whether something is an example as people write it, a text or a row, rather than a loader or several."""
    parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, tuple) else ()
    return isinstance(part, (str, Mapping, tuple)) and not any(hasattr(each, "dataset") for each in parts)
