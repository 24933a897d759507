"""The optimizer steps since the last checkpoint, with what each learning rate of theirs is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from lightning_tracin.parallel.fsdp import parameter_names
from lightning_tracin.storage.schemas import Step

#: The parameter names of each group of an optimizer.
Groups: TypeAlias = list[list[str]]


class NotedSteps:
    """The optimizer steps since the last checkpoint, and the parameters of the groups that their rates are of.

    A rate is stored by the places of its optimizer and group. Where a fit exchanges an optimizer or its groups before
    the next checkpoint, the steps that were made become those of an optimizer that has gone, which has a place of its
    own after those that there are. Groups that are only added leave the places of the others as they were.

    Args:
        module: that is trained.
        steps: those that a fit which is resumed has made.
        state: of :meth:`state`, when they were; empty for a fit from the start.

    Attributes:
        steps: in their order; the optimizer is its place, or, of those that have gone, -1, -2, ...
    """

    def __init__(self, module: nn.Module, steps: list[Step], state: Mapping[str, Any]) -> None:
        self.steps = steps
        self._module = module
        self._groups: dict[int, Groups] = dict(state.get("groups", {}))  # of each optimizer, by its place
        self._gone: list[tuple[int, Groups]] = [tuple(each) for each in state.get("gone", ())]
        self._looked_at: dict[int, list[list[int]]] = {}

    def add(self, number: int, place: int, optimizer: Optimizer, unmoved: list[str]) -> None:
        """Note a step.

        Args:
            number: how many were made before it.
            place: that of the optimizer among the trainer's.
            optimizer: has made it.
            unmoved: the keys of the sites that it left where they are.
        """
        self._look(place, optimizer)
        if self.steps and self.steps[-1][:2] == (number, place):  # of several for which Lightning counts one, the last
            self.steps.pop()
        self.steps.append((number, place, [float(group["lr"]) for group in optimizer.param_groups], unmoved))

    def of_checkpoint(self, optimizers: Sequence[Optimizer]) -> tuple[list[Step], list[Groups]]:
        """The steps, and the groups of the trainer's optimizers and of those that have gone."""
        for place, optimizer in enumerate(optimizers):
            self._look(place, optimizer)
        for place in [place for place in self._groups if place >= len(optimizers)]:
            self._let_go(place)
        groups = [self._groups[place] for place in range(len(optimizers))] + [gone for _, gone in self._gone]
        if self._gone and len(optimizers) == 1 and all(place == 0 for place, _ in self._gone):
            groups = _completed(groups)
        places = [at if at >= 0 else len(optimizers) - 1 - at for _, at, _, _ in self.steps]
        return [(each[0], at, *each[2:]) for at, each in zip(places, self.steps, strict=True)], groups

    def clear(self) -> None:
        """Begin anew, after a checkpoint."""
        self.steps, self._gone = [], []

    def state(self) -> dict[str, Any]:
        """What a fit that is resumed here needs to know."""
        return {"steps": self.steps, "groups": dict(self._groups), "gone": list(self._gone)}

    def _look(self, place: int, optimizer: Optimizer) -> None:
        """See which parameters an optimizer has in its groups now."""
        held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        if held == self._looked_at.get(place):
            return
        self._looked_at[place] = held
        names = parameter_names(self._module)
        groups = [[name for parameter in group for name in names.get(parameter, [])] for group in held]
        before = self._groups.get(place, [])
        if groups[: len(before)] != before:
            self._let_go(place)
        self._groups[place] = groups

    def _let_go(self, place: int) -> None:
        """Keep apart the steps that were made with the groups so far of the optimizer in a place."""
        groups = self._groups.pop(place)
        if any(at == place for _, at, *_ in self.steps):
            self._gone.append((place, groups))
            gone = -len(self._gone)
            self.steps = [(each[0], gone, *each[2:]) if each[1] == place else each for each in self.steps]


def _completed(groups: Sequence[Groups]) -> list[Groups]:
    """Groups of optimizers that followed each other, each with one more for what only the others have.

    The steps have no rate of that group, so that they count with rate 0 for its parameters, which they did not move.
    """
    held = [{name for group in each for name in group} for each in groups]
    missing = [sorted(set().union(*held) - own) for own in held]
    return [[*each, lacked] if lacked else each for each, lacked in zip(groups, missing, strict=True)]
