"""Which of a trace's checkpoints a question is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from lightning_tracin.checked_numbers import is_whole
from lightning_tracin.gradients.printable import enumerated
from lightning_tracin.storage.checkpoint import Checkpoint

#: None or "all", "last", a step, several steps, or a slice of the list of checkpoints.
CheckpointChoice: TypeAlias = str | int | Sequence[int] | slice | None

_NAMED = 20  # steps that a message names


def chosen_checkpoints(checkpoints: Sequence[Checkpoint], choice: CheckpointChoice) -> list[Checkpoint]:
    """Those of some checkpoints that a question is about, in the order of the fit.

    Args:
        checkpoints: all that there are.
        choice: which.

    Raises:
        ValueError: if it names none, or one that is not there; the message lists the steps of those that are.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    there = f"There are those of the steps {enumerated(steps, _NAMED)}." if steps else "There are none."
    if choice is None or choice == "all":
        return list(checkpoints)
    if choice == "last":
        return list(checkpoints[-1:])
    if isinstance(choice, slice):
        found = list(checkpoints[choice] if (choice.step or 1) > 0 else checkpoints[choice][::-1])
        if not found and checkpoints:
            raise ValueError(f"checkpoints={choice} names none of the {len(checkpoints)} checkpoints. {there}")
        return found
    wanted: Any = [choice] if is_whole(choice) else choice
    if not isinstance(wanted, Sequence) or isinstance(wanted, str) or not all(map(is_whole, wanted)) or not wanted:
        raise ValueError(
            'checkpoints must be "all", "last", a step, several steps or a slice of the list of checkpoints, but got '
            f"{choice!r}. {there}"
        )
    missing = sorted({int(step) for step in wanted} - set(steps))
    if missing:
        raise ValueError(f"The trace has no checkpoint of step {enumerated(missing, _NAMED)}. {there}")
    return [checkpoint for checkpoint in checkpoints if checkpoint.step in wanted]
