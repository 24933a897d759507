"""A pass over the training set: which examples come when, and how their gradients are stored.

Shards hold the same examples at every checkpoint, so that scores can be added up shard by shard. Each of several
processes stores whole shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tracin.gradients.capture import Captured
from lightning_tracin.gradients.rows import unique_tokens
from lightning_tracin.gradients.sites import Site
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.files import atomic_folder
from lightning_tracin.storage.shards import Shards, ShardWriter
from lightning_tracin.storage.trace import Trace


class NumberedExamples(Protocol):
    """What has to be known of a training set to choose the order in which it is read."""

    iterable: bool

    def lengths(self, indices: Sequence[int]) -> Tensor | None:
        """(len(indices),) how much text examples hold, to compare with each other; None where that is not known."""


def own_examples(trace: Trace, processes: Processes) -> range:
    """The training examples that a process stores: whole shards."""
    shards = processes.share(-(-trace.n_train // trace.shard_examples))
    return range(*(min(shard * trace.shard_examples, trace.n_train) for shard in (shards.start, shards.stop)))


def reading_order(trace: Trace, examples: NumberedExamples, processes: Processes) -> Sequence[int]:
    """A process's :func:`own_part`, each shard's examples from the longest to the shortest.

    Batches of examples that are about as long hold little padding. The stored texts tell how long they are, or else the
    data set; where neither does, the examples keep the order of the data set, as those of a stream must.

    Raises:
        ValueError: if the stored texts are damaged.
    """
    part = own_examples(trace, processes)
    if examples.iterable:
        return part
    lengths = _stored_lengths(trace, part)
    if lengths is None or not lengths.any():  # of a fit that looked at linear layers alone
        lengths = examples.lengths(part)
    if lengths is None:
        return part
    order: list[int] = []
    for of_shard in torch.split(lengths, trace.shard_examples):
        order += (torch.argsort(of_shard, descending=True, stable=True) + part.start + len(order)).tolist()
    return order


@contextmanager
def shard_writer(
    trace: Trace, folder: Path, processes: Processes = ALONE, order: Sequence[int] | None = None
) -> Iterator[ShardWriter]:
    """A writer of a process's shards into a folder that appears when it is complete."""
    first_shard = own_examples(trace, processes).start // trace.shard_examples
    with (
        atomic_folder(folder, processes) as appearing,
        ShardWriter(
            appearing,
            dtype=trace.dtype,
            shard_examples=trace.shard_examples,
            first_shard=first_shard,
            order=order,
        ) as writer,
    ):
        yield writer


@contextmanager
def training_pass(
    trace: Trace,
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    order: Sequence[int],
    processes: Processes = ALONE,
    *,
    tolerant: bool = True,
) -> Iterator[TrainingPass]:
    """Store the training examples' gradients at a checkpoint; all appear when every example was added.

    Args:
        trace: where.
        checkpoint: of the trace.
        sites: whose gradients are stored.
        order: in which this process adds the examples of its part. Those of a shard come together.
        processes: those that each add their part.
        tolerant: whether an example whose loss or gradient is not finite counts zero, rather than ends the pass.

    Raises:
        ValueError: if another number of examples was added than the training set has, or if gradients are not finite:
            that of one example, or, with ``tolerant``, those of more than half.
    """
    with ExitStack() as folders:
        writers = {
            site: folders.enter_context(shard_writer(trace, checkpoint.path / site.key, processes, order))
            for site in sites
        }
        texts = None
        if not processes.gather(trace.has_texts)[0]:
            texts = folders.enter_context(shard_writer(trace, trace.path / "texts", processes, order))
        filled = TrainingPass(trace, writers, texts, processes, order)
        filled.tolerant = tolerant
        yield filled
        filled.close(checkpoint.step)


class TrainingPass:
    """Takes the captured batches of one pass over the training set, or a process's part of it, in a known order."""

    def __init__(
        self,
        trace: Trace,
        writers: Mapping[Site, ShardWriter],
        texts: ShardWriter | None,
        processes: Processes,
        order: Sequence[int],
    ) -> None:
        self.n_examples = 0
        self.tolerant = True
        self._not_finite: list[int] = []
        self._order = order
        self._processes = processes
        self._trace = trace
        self._writers = writers
        self._texts = texts
        self._vocabulary: dict[int, str] = {}

    def unknown_tokens(self, captured: Captured) -> list[int]:
        """The token ids of a batch whose words are not known yet, each once."""
        if self._texts is None:
            return []
        return [token for token in unique_tokens(captured.token_ids) if token not in self._vocabulary]

    def add(self, captured: Captured, labels: Tensor | None, words: Mapping[int, str]) -> None:
        """Store the next examples.

        Args:
            captured: their gradients.
            labels: (B, ...) their labels, kept for printing if they are one number for each.
            words: what to print for token ids that are new.

        Raises:
            ValueError: if a loss or gradient is not finite; the message names the training example.
        """
        if self.n_examples + len(captured) > len(self._order):
            raise ValueError(self._other_number(f"more than {len(self._order)}"))
        bad = captured.not_finite()
        if bool(bad.any()):
            places = torch.nonzero(bad)[:, 0].tolist()
            found = [self._order[self.n_examples + place] for place in places]
            if not self.tolerant:
                raise ValueError(
                    f"The loss or gradient of training example {found[0]} is NaN or infinite. Look at that example, or "
                    "at the learning rate; what was stored before is complete."
                )
            self._not_finite += found
            captured = captured.without_gradients_of(bad)
        for site, writer in self._writers.items():
            writer.add(site.stored(captured.gradients[site.key]))
        if self._texts is not None:
            self._vocabulary.update(words)
            self._texts.add(captured.texts(labels))
        self.n_examples += len(captured)

    def close(self, step: int) -> None:
        """Finish the files; every training example must have been added."""
        if self.n_examples != len(self._order):
            raise ValueError(self._other_number(str(self.n_examples)))
        not_finite = all_not_finite(self._not_finite, self._trace.n_train, step, self._processes)
        for writer in self._writers.values():
            writer.close(self._processes, not_finite)
        if self._texts is not None:
            self._texts.close(self._processes)
            self._trace.add_words(self._vocabulary, self._processes)

    def _other_number(self, found: str) -> str:
        """That a pass gave another number of examples than there are."""
        them = "it" if len(self._order) == self._trace.n_train else f"{len(self._order)} of them"
        return (
            f"The training set has {self._trace.n_train} examples, but a pass over {them} gave {found}: the collate "
            "function drops or adds examples, so that they cannot be numbered."
        )


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
    named = ", ".join(map(str, found[:10])) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    what = f"The loss or gradient of {len(found)} of {n_recorded} training examples is NaN or infinite at step {step}"
    if 2 * len(found) > n_recorded:
        raise ValueError(f"{what} (example {named}). Look at the learning rate; what was stored before is complete.")
    rank_zero_warn(f"{what}: {named}. They count with a gradient of zero there. Look at these examples.")
    return found


def _stored_lengths(trace: Trace, part: range) -> Tensor | None:
    """(len(part),) how many words the stored texts of some whole shards hold, if there are any.

    Raises:
        ValueError: if the texts are damaged.
    """
    path = trace.path / "texts"
    if not part or not (path / "index.json").exists():
        return None
    texts = Shards.open(path)
    trace.check_counts(texts)
    shards = range(part.start // trace.shard_examples, -(-part.stop // trace.shard_examples))
    blocks: Iterator[Texts] = (texts.read(shard) for shard in shards)
    return torch.cat([torch.bincount(block.examples, minlength=block.n_examples) for block in blocks])
