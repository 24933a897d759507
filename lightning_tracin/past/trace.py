"""Trace as users see it: opened by its folder, or made from the checkpoints of a run that is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_tracin.storage.trace import Trace as StoredTrace

if TYPE_CHECKING:
    from typing_extensions import Self

#: A file or folder, a state dict, or a trace.
Source: TypeAlias = str | Path | Mapping[str, Any] | StoredTrace


class _Opened(type):
    """Makes a trace that a fit or a result opened an instance, too: it is the same folder, and has the same methods."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, StoredTrace)


class Trace(StoredTrace, metaclass=_Opened):
    """Opens the folder that a fit with :class:`~lightning_tracin.TracInCallback` wrote, or makes one of checkpoints.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: if there is no trace in the folder.
        ValueError: if another version of lightning_tracin wrote it, or it is damaged.

    Example::

        for checkpoint in Trace("trace").checkpoints:
            print(checkpoint.step, checkpoint.learning_rate)
    """

    @classmethod
    def from_checkpoints(
        cls,
        path: str | Path,
        checkpoints: Source | Sequence[Source],
        model: Any,
        train_dataloaders: Any,
        *,
        learning_rates: Sequence[float] | None = None,
        methods: Sequence[str] = ("tracin-we", "tracin-last"),
        rank: tuple[int, int] | None = None,
    ) -> Self:
        """Make a trace of a run that is over; training examples' gradients are computed at the first question.

        No code in a file is run: what ``torch.save`` wrote is read with torch 2.6 or newer. Where the trainer saved
        its optimizers, each layer has the learning rate of its parameter group, and Adam's second moments are there for
        ``precondition="adam"``. What is only approximate (rates between checkpoints that cannot be told) is warned of,
        and said by every result. Examples that the loader's sampler can draw are taken for trained on.

        Call it in one process. The model's weights are afterwards as they were.

        Args:
            path: the folder of the trace, which must have none yet.
            checkpoints: Lightning's ``.ckpt`` files, folders that Hugging Face's Trainer saved (``checkpoint-500``, or
                the one that holds them all), or state dicts (files or objects), in any order where they tell their
                steps. Or another trace: its checkpoints are taken over, and where the training set is another one than
                its own, that holds *candidates*, which were not trained on.
            model: the LightningModule that was trained, or a Hugging Face model.
            train_dataloaders: one loader of the training set, or a datamodule.
            learning_rates: one for each checkpoint, in the order in which they are passed, in the place of those that
                the files tell. Those of a folder are in the order of their steps.
            methods: as for :class:`~lightning_tracin.TracInCallback`, like ``rank``.
            rank: how many of K-FAC's components of linear layers' gradients are stored.

        Raises:
            FileExistsError: if a trace, or files of others, are in the folder.
            FileNotFoundError: if a checkpoint is missing.
            ValueError: if a file is damaged, holds objects that only unpickling would give, was written by
                ``torch.save`` and torch is older than 2.6, or is of another model; if it does not tell learning rates
                and none are given; or on what influence cannot be computed for.
            BlockingIOError: if a fit or a query is writing into the folder.

        Example::

            trace = Trace.from_checkpoints("trace", sorted(Path("runs").glob("*.ckpt")), model, train_loader)
            Trainer().influence(test_loader, model, trace=trace, train_dataloaders=train_loader)
        """
        from lightning_tracin.past.beginning import begin_past  # here: it brings Lightning, which takes seconds

        begin_past(path, checkpoints, model, train_dataloaders, learning_rates, methods, rank=rank)
        return cls(path)
