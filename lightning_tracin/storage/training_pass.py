"""A pass over the training set: the order in which examples are read, and the storing of their gradients in shards.

A shard has the same examples at every checkpoint, so that scores can be summed shard by shard. With several processes,
each stores a contiguous range of complete shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.kronecker import KroneckerFactors
from lightning_tracin.gradients.printable import enumerated
from lightning_tracin.gradients.rows import unique_tokens
from lightning_tracin.gradients.sites import Site
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.files import atomic_folder
from lightning_tracin.storage.known_texts import KnownTexts
from lightning_tracin.storage.shards import Shards, ShardWriter
from lightning_tracin.storage.sorting import SortingWriter, sorting
from lightning_tracin.storage.trace import Trace


class NumberedExamples(Protocol):
    """The properties of a training set on which the reading order depends.

    Attributes:
        iterable: whether it is a stream, which can be read in one order only.
    """

    iterable: bool

    @property
    def batches(self) -> Sequence[Sequence[int]] | None:
        """Batches of all of its examples, which alone can be collated; None if any examples can."""

    def lengths(self, indices: Sequence[int]) -> Tensor | None:
        """(len(indices),) the examples' lengths, in any unit; None if they are not known."""


def _by_shards(trace: Trace, order: Sequence[int], processes: Processes) -> bool:
    """Whether an order is of this process's own examples alone, and has those of each shard together."""
    own, numbers = own_examples(trace, processes), torch.tensor(order, dtype=torch.long)
    ascending = (numbers // trace.shard_examples).diff() >= 0
    return bool(ascending.all() and (numbers >= own.start).all() and (numbers < own.stop).all())


def own_examples(trace: Trace, processes: Processes) -> range:
    """The indices of the training examples that this process stores: those of complete shards."""
    shards = processes.share(-(-trace.n_train // trace.shard_examples))
    return range(*(min(shard * trace.shard_examples, trace.n_train) for shard in (shards.start, shards.stop)))


def reading_order(
    trace: Trace, examples: NumberedExamples, drawn: Tensor | None, processes: Processes
) -> Sequence[int]:
    """The indices of this process's examples that are read, in each shard from the longest to the shortest.

    Batches of similar lengths contain little padding. Lengths come from the stored texts, or else from the data set. A
    stream, and a data set without known lengths, keeps its order. Where only some batches can be collated, a process
    has a share of these, whose examples may be of any shard.

    Args:
        trace: the trace, which has the stored texts and the number of examples in a shard.
        examples: the training set.
        drawn: (n_train,) bool, the examples that are read; None for all.
        processes: the processes that each store their own examples.

    Raises:
        ValueError: if the stored texts are damaged.
    """
    indices = own_examples(trace, processes)
    if examples.iterable:
        return indices
    if examples.batches is not None:
        shared = [index for number in processes.share(len(examples.batches)) for index in examples.batches[number]]
        return [index for index in shared if drawn is None or drawn[index]]
    lengths = _stored_lengths(trace, indices)
    if lengths is None or not lengths.any():  # texts are empty if only linear layers were recorded
        lengths = examples.lengths(indices)
    order = torch.arange(indices.start, indices.stop)
    if lengths is not None:
        order = order[torch.argsort(lengths, descending=True, stable=True)]
        order = order[torch.argsort(order // trace.shard_examples, stable=True)]
    return (order if drawn is None else order[drawn[order]]).tolist()


@contextmanager
def shard_writer(
    trace: Trace,
    folder: Path,
    processes: Processes = ALONE,
    order: Sequence[int] | None = None,
    *,
    factors: KroneckerFactors | None = None,
) -> Iterator[ShardWriter]:
    """A writer of this process's shards into a folder that is created atomically.

    Args:
        trace: the trace.
        folder: the folder of the shards.
        processes: the processes that write shards; every one of them must enter the context.
        order: the order in which this process adds its examples; None for all, in that of the data set.
        factors: see :class:`ShardWriter`.
    """
    with (
        atomic_folder(folder, processes) as partial,
        ShardWriter(
            partial,
            dtype=trace.dtype,
            shard_examples=trace.shard_examples,
            examples=own_examples(trace, processes),
            order=order,
            factors=factors,
        ) as writer,
    ):
        yield writer


@contextmanager
def sorting_writer(
    trace: Trace,
    folder: Path,
    processes: Processes,
    order: Sequence[int],
    *,
    factors: KroneckerFactors | None = None,
) -> Iterator[SortingWriter]:
    """What :func:`shard_writer` gives, for examples in any order, and of any shards.

    Args:
        trace: the trace.
        folder: the folder of the shards.
        processes: the processes that add examples; every one of them must enter the context.
        order: the order in which this process adds its examples.
        factors: see :class:`ShardWriter`.
    """
    running = trace.path / "running.partial" / f"process-{processes.rank}"
    with (
        shard_writer(trace, folder, processes, factors=factors) as writer,
        sorting(writer, running, trace.n_train, folder.name, order) as sorted_writer,
    ):
        yield sorted_writer


@contextmanager
def training_pass(
    trace: Trace,
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    order: Sequence[int],
    processes: Processes = ALONE,
    *,
    tolerant: bool = True,
    known: KnownTexts | None = None,
    factors: Mapping[Site, KroneckerFactors] | None = None,
) -> Iterator[TrainingPass]:
    """Store the training examples' gradients at a checkpoint; they become readable when every example was added.

    Args:
        trace: the trace.
        checkpoint: a checkpoint of the trace.
        sites: the sites whose gradients are stored.
        order: the order in which this process adds its examples, see :func:`reading_order`. Where those of a shard are
            not added together, they are sorted on disk when all have come.
        processes: the processes that each add their own examples; every one of them must enter the context.
        tolerant: whether an example without a finite loss or gradient counts zero, rather than ends the pass.
        known: of a stream, its examples as they were read before.
        factors: those of K-FAC at the checkpoint, of the sites that have a rank.

    Raises:
        ValueError: if the number of examples that were added differs from that of the training set, if a stream gave
            others than before, or if gradients are not finite: that of one example, or, with ``tolerant``, those of
            more than half.
    """
    ordered = all(processes.gather(_by_shards(trace, order, processes)))

    known_factors = factors or {}

    def writer_to(folder: Path, site: Site | None = None) -> AbstractContextManager[ShardWriter | SortingWriter]:
        of_site = None if site is None else known_factors.get(site)
        return (shard_writer if ordered else sorting_writer)(trace, folder, processes, order, factors=of_site)

    with ExitStack() as folders:
        writers = {site: folders.enter_context(writer_to(checkpoint.path / site.key, site)) for site in sites}
        texts = None
        drawn = checkpoint.drawn()
        if not processes.gather(trace.has_texts_of(drawn))[0]:
            folder = trace.path if drawn is None else checkpoint.path
            texts = folders.enter_context(writer_to(folder / "texts"))
        writer = TrainingPass(trace, writers, texts, processes, order, tolerant=tolerant, known=known)
        yield writer
        writer.close(checkpoint.step)


class TrainingPass:
    """Stores the captured batches of one pass over the training set, or over this process's examples.

    Attributes:
        n_examples: number of examples that were added.
    """

    def __init__(
        self,
        trace: Trace,
        writers: Mapping[Site, ShardWriter | SortingWriter],
        texts: ShardWriter | SortingWriter | None,
        processes: Processes,
        order: Sequence[int],
        *,
        tolerant: bool = True,
        known: KnownTexts | None = None,
    ) -> None:
        self.n_examples = 0
        self._known = known
        self._tolerant = tolerant
        self._not_finite: list[int] = []
        self._order = order
        self._processes = processes
        self._trace = trace
        self._writers = writers
        self._texts = texts
        self._vocabulary: dict[int, str] = {}

    def unknown_tokens(self, captured: Captured) -> list[int]:
        """The distinct token ids of a batch whose words were not added yet; none if this pass stores no texts."""
        if self._texts is None:
            return []
        return [token for token in unique_tokens(captured.token_ids) if token not in self._vocabulary]

    def add(self, captured: Captured, labels: Tensor | None, words: Mapping[int, str]) -> None:
        """Store the next examples.

        Args:
            captured: their losses, tokens and gradients.
            labels: (B, ...) their labels, which are stored if they are one number for each example.
            words: the words of token ids that are new.

        Raises:
            OSError: if a shard cannot be written.
            ValueError: if a loss or gradient is not finite (the message names the training example), or if there are
                more examples than the training set has.
        """
        if self.n_examples + len(captured) > len(self._order):
            raise ValueError(self._wrong_number(f"more than {len(self._order)}"))
        bad = captured.not_finite()
        if bool(bad.any()):
            places = torch.nonzero(bad)[:, 0].tolist()
            found = [self._order[self.n_examples + place] for place in places]
            if not self._tolerant:
                raise ValueError(
                    f"The {captured.fault(places[0])} of training example {found[0]} is NaN or infinite. Look at that "
                    "example, or at the learning rate; what was stored before is complete."
                )
            self._not_finite += found
            captured = captured.without_gradients_of(bad)
        for site, writer in self._writers.items():
            writer.add(site.stored(captured.gradients[site.key], writer.factors))
        if self._known is not None:
            self._known.compare(captured.texts(labels))
        if self._texts is not None:
            self._vocabulary.update(words)
            self._texts.add(captured.texts(labels))
        self.n_examples += len(captured)

    def close(self, step: int) -> None:
        """Write the last shards and the indexes.

        Args:
            step: the step of the checkpoint.

        Raises:
            OSError: if a file cannot be written.
            ValueError: if not all of this process's examples were added, if a stream gave others than before, or if
                more than half have no finite gradient.
        """
        if self.n_examples != len(self._order):
            raise ValueError(self._wrong_number(str(self.n_examples)))
        if self._known is not None:
            self._known.check()
        n_read = sum(self._processes.gather(len(self._order)))
        not_finite = all_not_finite(self._not_finite, n_read, step, self._processes)
        for writer in self._writers.values():
            writer.close(self._processes, not_finite)
        if self._texts is not None:
            self._texts.close(self._processes)
            self._trace.add_words(self._vocabulary, self._processes)

    def _wrong_number(self, found: str) -> str:
        """The message of the error that a pass gave more or fewer examples than there are."""
        them = "it" if len(self._order) == self._trace.n_train else f"{len(self._order)} of them"
        return (
            f"The training set has {self._trace.n_train} examples, but a pass over {them} gave {found}: the collate "
            "function drops or adds examples, so that they cannot be numbered."
        )


def stored_stream(trace: Trace) -> KnownTexts | None:
    """The examples of a stream as the first pass has stored them; None before that.

    Raises:
        ValueError: if the texts are damaged.
    """
    path = trace.path / "texts"
    if not (path / "index.json").exists():
        return None
    texts = Shards.open(path, within=trace.path).checked("texts", trace.header)
    return KnownTexts(texts.read(shard) for shard in range(len(texts)))


def all_not_finite(own: Iterable[int], n_recorded: int, step: int, processes: Processes) -> list[int]:
    """The examples of all processes whose gradients were not finite at a checkpoint; a warning names them.

    Args:
        own: those of this process.
        n_recorded: how many examples gave gradients.
        step: of the checkpoint.
        processes: every one of them must call it.

    Raises:
        ValueError: if they are more than half: the training has diverged.
    """
    found = sorted({example for of_process in processes.gather(list(own)) for example in of_process})
    if not found:
        return []
    named = enumerated(found, 10)
    what = f"The loss or gradient of {len(found)} of {n_recorded} training examples is NaN or infinite at step {step}"
    if 2 * len(found) > n_recorded:
        raise ValueError(f"{what} (example {named}). Look at the learning rate; what was stored before is complete.")
    rank_zero_warn(f"{what}: {named}. They count with a gradient of zero there. Look at these examples.")
    return found


def _stored_lengths(trace: Trace, indices: range) -> Tensor | None:
    """(len(indices),) the number of stored tokens of examples of complete shards; None if no texts are stored.

    Raises:
        ValueError: if the texts are damaged.
    """
    path = trace.path / "texts"
    if not indices or not (path / "index.json").exists():
        return None
    texts = Shards.open(path, within=trace.path).checked("texts", trace.header)
    shards = range(indices.start // trace.shard_examples, -(-indices.stop // trace.shard_examples))
    blocks: Iterator[Texts] = (texts.read(shard) for shard in shards)
    return torch.cat([block.rows_by_example() for block in blocks])
