"""What training examples say, in the words of a result, whichever it lists."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_tracin import InfluenceResult
from lightning_tracin.report.explanation import Example
from lightning_tracin.results.train_examples import train_examples


def examples_of_training(result: InfluenceResult, indices: Sequence[int]) -> dict[int, Example]:
    """Training examples by index, read of the trace."""
    assert result.trace is not None
    return train_examples(result.trace, indices, result._reader, result.raw_train)
