"""Which training examples were trained on since the last checkpoint: what the sampler says, not the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.parallel.processes import Processes


class DrawnExamples:
    """Counts the examples that a process has trained on since the last checkpoint.

    Args:
        n_train: the number of examples in the training data set.
        processes: those that train together.
        before: what :meth:`state` said, of a fit that is resumed between two checkpoints; None at a checkpoint. If it
            is of another process, as where only the first one's state is kept, what this one drew is not known.
    """

    def __init__(self, n_train: int, processes: Processes, before: Mapping[str, Any] | None = None) -> None:
        self._processes = processes
        self._n_train = n_train
        self._drawn: Tensor | None = torch.zeros(n_train, dtype=torch.bool)
        if before is not None:
            known = before.get("rank") == processes.rank and before.get("size") == processes.size
            self._drawn = before.get("drawn") if known else None

    def add(self, indices: Sequence[int] | None) -> None:
        """Count the examples of a batch that was trained on; None: they are not known."""
        if indices is None:
            self._drawn = None
        elif self._drawn is not None:
            self._drawn[list(indices)] = True

    def of_all(self) -> Tensor | None:
        """(n_train,) bool, the examples that any process has trained on; None if it is all, or if it is not known.

        Every process must ask.
        """
        found = self._processes.gather(self._drawn)
        if any(each is None for each in found):
            return None
        drawn = torch.stack(found).any(0)
        return None if drawn.all() else drawn

    def clear(self) -> None:
        """Begin anew, at a checkpoint."""
        self._drawn = torch.zeros(self._n_train, dtype=torch.bool)

    def state(self) -> dict[str, Any]:
        """What a resumed fit needs to know."""
        return {"rank": self._processes.rank, "size": self._processes.size, "drawn": self._drawn}
