"""Whether a training loader still has the examples that a trace was begun with, under the same numbers."""

from __future__ import annotations

from typing import Any

from lightning_tracin.bridge.fingerprint import number_hash
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.bridge.unmoved import unmoved
from lightning_tracin.storage.trace import Trace


def require_same_examples(loader: Any, trace: Trace, *, made_anew_for: int | None = None) -> None:
    """Check that a training loader's data set is that which a trace was begun with.

    Some of its examples are read, twice, unless they were different each time when the trace was begun.

    Args:
        loader: the fit's, as it is now.
        trace: what the fit records.
        made_anew_for: the epoch that Lightning has made it anew for; None if it is the loader that there was before.

    Raises:
        ValueError: if the data set is another one, or has been changed in place.
    """
    with unmoved(loader):
        training_set = TrainingSet(loader)
        by_number = number_hash(len(training_set))
        if len(training_set) != trace.n_train:
            difference = f"{len(training_set)} examples instead of {trace.n_train}"
        elif trace.data_fingerprint == by_number:
            return
        elif training_set.fingerprint() in (trace.data_fingerprint, by_number):
            return  # the latter gives others each time, though not when the trace was begun
        else:
            difference = "other examples, or the same in another order"
    wrong = f"{difference}: gradients would be stored under the numbers of other examples."
    if made_anew_for is None:
        raise ValueError(
            f"The training data set was changed during the fit, and has {wrong} Let it hold all of the examples, in "
            "one order, from the start, and the loader's sampler choose and shuffle those of an epoch."
        )
    raise ValueError(
        f"The training loader was made anew for epoch {made_anew_for}, and its data set has {wrong} Let "
        "train_dataloader give the same data set each time, with all of the examples, and its sampler choose those of "
        "the epoch; or fit without reload_dataloaders_every_n_epochs."
    )
