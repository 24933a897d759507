"""The optimizer steps of a long stretch between two checkpoints, summed up: their file stays small, and can be read."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from lightning_tracin.storage.schemas import Step

#: Numbers and keys of all steps together that are still stored one by one; they take half a second to read.
_MOST_VALUES = 100_000


def summed_up(steps: Sequence[Step]) -> tuple[list[Step], list[int]]:
    """Steps as they are stored: one by one, or, if they are very many, one for all that are alike but for their rates.

    The mean learning rate of a layer needs the sum of the rates of the steps that moved it, and the number of all: only
    steps of one optimizer that moved the same sites are summed up, so that neither changes.

    Args:
        steps: since the checkpoint before.

    Returns:
        The steps, each with the number of its first and the mean of its rates, and how many each stands for; none
        where that is one each.
    """
    if sum(6 + len(rates) + len(unmoved) for _, _, rates, unmoved in steps) <= _MOST_VALUES:
        return list(steps), []
    alike: dict[tuple[int, int, tuple[str, ...]], list[Step]] = {}
    for step in steps:
        _, optimizer, rates, unmoved = step
        alike.setdefault((optimizer, len(rates), tuple(unmoved)), []).append(step)
    summed: list[Step] = []
    for (optimizer, _, keys), several in alike.items():
        means = [fsum(of_group) / len(several) for of_group in zip(*(step[2] for step in several), strict=True)]
        summed.append((several[0][0], optimizer, means, list(keys)))
    return summed, [len(several) for several in alike.values()]
