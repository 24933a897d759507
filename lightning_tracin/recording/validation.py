"""Choosing examples of a validation, as its batches come, with their rows of the batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_tracin.bridge.mixin import labels_of_module
from lightning_tracin.bridge.observing import Observer
from lightning_tracin.gradients.batches import batch_size, row_of
from lightning_tracin.gradients.losses import checked_losses
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.parallel.processes import Processes


@dataclass(frozen=True)
class Validated:
    """A validation example.

    Attributes:
        loader: the number of its loader.
        index: its index in the data set where that is known, else its place in the loader's order.
        loss: at the validation.
        prediction: what the model said of it then: the class and its probability, or a value and NaN; NaN where it is
            not known.
    """

    loader: int
    index: int
    loss: float
    prediction: tuple[float, float]


@dataclass(frozen=True)
class Validation:
    """What is left of a validation, to be explained.

    Attributes:
        step: the one that Lightning logs the validation's own metrics under.
        epoch: the one that it ran in.
        examples: in the order in which they are logged, on all processes.
        rows: those of them that this process has seen, each as a batch of its own, by their place among all.
    """

    step: int
    epoch: int
    examples: Sequence[Validated]
    rows: Mapping[int, Any]

    def without(self, places: Collection[int]) -> Validation:
        """The same without some of the examples."""
        kept = [place for place in range(len(self.examples)) if place not in places]
        rows = {new: self.rows[old] for new, old in enumerate(kept) if old in self.rows}
        return Validation(self.step, self.epoch, [self.examples[place] for place in kept], rows)


class Choice:
    """Chooses examples of one validation, as its batches come.

    Args:
        observer: of the module whose losses and predictions count; call :meth:`see` in eval mode, without gradients.
        wanted: how many of the highest loss; or the indices of those to take from each loader.
        loaders: the validation loaders.
        processes: those that validate together, each a part.
    """

    def __init__(
        self,
        observer: Observer,
        wanted: int | tuple[int, ...],
        loaders: Sequence[Any],
        processes: Processes,
    ) -> None:
        self._observer = observer
        self._losses = observer.losses
        self._wanted = wanted
        self._processes = processes
        self._sampled = [_sampled(loader) for loader in loaders]
        self._seen: Counter[int] = Counter()
        self._found: dict[tuple[int, int], tuple[Validated, Any]] = {}
        self._not_finite = 0

    def see(self, batch: Any, loader: int) -> None:
        """Look at the next batch of a loader.

        Raises:
            ValueError: if the batch cannot be cut into examples.
        """
        if isinstance(self._wanted, tuple):
            size = batch_size(batch)
            if size is not None and not set(self._numbers(loader, size)).intersection(self._wanted):
                self._seen[loader] += size
                return
        losses, predictions = self._look(batch)
        numbers = self._numbers(loader, len(losses))
        self._seen[loader] += len(losses)
        self._not_finite += int((~torch.isfinite(losses)).sum())
        for place in self._candidates(losses, numbers):
            row = self._cut(batch, place, losses)
            value, confidence = predictions[place].tolist()
            example = Validated(loader, numbers[place], float(losses[place]), (value, confidence))
            self._found[loader, example.index] = (example, row)
        kept = self._in_order([example for example, _ in self._found.values()])
        self._found = {(each.loader, each.index): self._found[each.loader, each.index] for each in kept}

    def choose(self, step: int, epoch: int) -> Validation:
        """The choice of all processes."""
        owners: dict[tuple[int, int], int] = {}
        examples: list[Validated] = []
        not_finite = 0
        found = self._processes.gather(([example for example, _ in self._found.values()], self._not_finite))
        for rank, (of_process, bad) in enumerate(found):
            not_finite += bad
            for each in of_process:
                if (each.loader, each.index) not in owners:  # samplers give some twice, so that all have as many
                    owners[each.loader, each.index] = rank
                    examples.append(each)
        examples = self._in_order(examples)
        keys = [(each.loader, each.index) for each in examples]
        rows = {place: self._found[key][1] for place, key in enumerate(keys) if owners[key] == self._processes.rank}
        if not_finite:
            rank_zero_warn(f"The loss of {not_finite} validation examples is NaN or infinite: they are not explained.")
        if isinstance(self._wanted, tuple) and not not_finite:
            missing = sorted(set(self._wanted) - {each.index for each in examples})
            if missing:
                rank_zero_warn(f"log_examples asks for {missing}, but the validation came upon no such examples.")
        return Validation(step, epoch, examples, rows)

    def _look(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The losses (B,) and predictions (B, 2) of a batch; without losses of single examples, row by row."""
        losses = []
        predictions = []
        for part in self._losses.rows(batch) if isinstance(self._losses, MeanLoss) else [batch]:
            self._observer.warn_if_untold(part)
            with self._observer.probe.watched():
                losses.append(checked_losses(self._losses(part)).detach().float().cpu())
            labels = labels_of_module(self._observer.module, part, len(losses[-1]))
            predictions.append(self._observer.predictions(labels, losses[-1]))
        return torch.cat(losses), torch.cat(predictions)

    def _numbers(self, loader: int, size: int) -> list[int]:
        """The indices of the next examples of a loader."""
        start = self._seen[loader]
        sampled = self._sampled[loader]
        if sampled is not None:
            return sampled[start : start + size]
        return [place * self._processes.size + self._processes.rank for place in range(start, start + size)]

    def _candidates(self, losses: Tensor, numbers: Sequence[int]) -> list[int]:
        """The places in a batch of the examples that may be among those chosen."""
        values = losses.tolist()
        finite = [place for place, loss in enumerate(values) if math.isfinite(loss)]
        if isinstance(self._wanted, tuple):
            return [place for place in finite if numbers[place] in self._wanted]
        least = min((each.loss for each, _ in self._found.values()), default=-torch.inf)
        highest = sorted(finite, key=lambda place: -values[place])[: self._wanted]
        return [place for place in highest if len(self._found) < self._wanted or values[place] > least]

    def _in_order(self, examples: Sequence[Validated]) -> list[Validated]:
        """Of some examples those that are chosen, in the order in which they are logged."""
        wanted = self._wanted
        if isinstance(wanted, tuple):
            return sorted(examples, key=lambda each: (each.loader, wanted.index(each.index)))
        return sorted(examples, key=lambda each: (-each.loss, each.loader, each.index))[:wanted]

    def _cut(self, batch: Any, place: int, losses: Tensor) -> Any:
        """One example as a batch of its own, in memory of its own; the first one is checked to be what it was."""
        row = apply_to_collection(row_of(batch, place, len(losses)), Tensor, torch.clone)
        if not self._found:
            self._check_alone(row, losses[place])
        return row

    def _check_alone(self, row: Any, loss: Tensor) -> None:
        """Check that an example has the loss, cut out of its batch, that it had inside."""
        failure = None
        try:
            alone = checked_losses(self._losses(row)).float().cpu()
            found = f"a loss of {alone.tolist()}"
            same = len(alone) == 1 and bool(torch.isclose(alone[0], loss, rtol=0.05, atol=1e-3))
        except Exception as error:  # from anywhere in the model, which is given what it is not made for
            failure, found, same = error, f"an error ({error})", False
        if not same:
            raise ValueError(
                f"log_examples must cut examples out of the validation batches, but one with loss {float(loss):.4g} in "
                f"its batch gave {found} alone. The first dimension of the batch's tensors must count its examples; "
                "where it does not, use log_examples=0."
            ) from failure


def _sampled(loader: Any) -> list[int] | None:
    """The data set indices that a loader's sampler gives a process in an epoch, where it is sure to give them again.

    Another sampler is not asked: that might draw the random numbers of the next epoch.
    """
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, Sequence):
        return [int(index) for batch in batches for index in batch]
    sampler = getattr(batches, "sampler", None)
    return [int(index) for index in sampler] if isinstance(sampler, (DistributedSampler, Sequence)) else None


def flat_loaders(loaders: Any) -> list[Any]:
    """The loaders inside of lists and mappings, in the order in which Lightning numbers them."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return (
        [each for part in loaders for each in flat_loaders(part)] if isinstance(loaders, (list, tuple)) else [loaders]
    )
