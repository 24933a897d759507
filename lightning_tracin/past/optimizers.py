"""Whose the states in a checkpoint's optimizers are: which parameter each of the numbers there stands for.

A saved state numbers parameters in the order in which the optimizer was given them. That is known where the module
makes the optimizer again, by the Trainer's own rule, or by names that were saved. It is never guessed: group sizes and
shapes must agree, or the states count as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_tracin.past.checkpoints import PastCheckpoint

#: The parameters of each group of each optimizer.
Groups: TypeAlias = list[list[list[nn.Parameter]]]

_OF_A_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # states that have the parameter's shape


class SavedOptimizer(torch.optim.Optimizer):
    """An optimizer that has a saved state, and makes no steps.

    Args:
        state: its state dict.
        groups: the parameters of each of its groups.
    """

    def __init__(self, state: Mapping[str, Any], groups: Sequence[Sequence[nn.Parameter]]) -> None:
        options = ({k: v for k, v in group.items() if k != "param_names"} for group in state["param_groups"])
        super().__init__([{**own, "params": list(each)} for own, each in zip(options, groups, strict=True)], {})
        for group, parameters in zip(state["param_groups"], groups, strict=True):
            for number, parameter in zip(group["params"], parameters, strict=True):
                if number in state["state"]:
                    self.state[parameter] = state["state"][number]


def groups_of(
    checkpoint: PastCheckpoint,
    module: nn.Module,
    names: Mapping[str, str],
    configured: Sequence[torch.optim.Optimizer] | str,
) -> Groups | str:
    """The parameters that the states of a checkpoint's optimizers are of, or why that is not known.

    Args:
        checkpoint: has the states.
        module: the module.
        names: the module's name of each weight of the checkpoint.
        configured: the optimizers that the module makes, or why it makes none.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: Groups | str = _by_names(checkpoint, parameters, names)
    if not found and checkpoint.of_trainer:
        found = [_groups_of_trainer(module)]
    elif not found:
        found = configured if isinstance(configured, str) else _groups_in(configured)
    return found if isinstance(found, str) else _problem(checkpoint, found) or found


def _by_names(checkpoint: PastCheckpoint, parameters: Mapping[str, nn.Parameter], names: Mapping[str, str]) -> Groups:
    """The groups, where each parameter is saved by its name; none where one is not."""
    found: Groups = []
    for state in checkpoint.optimizers:
        groups = []
        for group in state["param_groups"]:
            saved = group.get("param_names", group["params"])
            own = [names.get(each, "") for each in saved if isinstance(each, str)]
            if len(own) != len(group["params"]) or not all(each in parameters for each in own):
                return []
            groups.append([parameters[each] for each in own])
        found.append(groups)
    return found


def _groups_in(optimizers: Sequence[torch.optim.Optimizer]) -> Groups:
    return [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]


def _groups_of_trainer(module: nn.Module) -> list[list[nn.Parameter]]:
    """The two groups that Hugging Face's Trainer makes: with weight decay, and without."""
    from transformers import PreTrainedModel, Trainer  # here: it takes seconds

    model = next((part for part in module.modules() if isinstance(part, PreTrainedModel)), module)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it uses no trainer
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[parameter for name, parameter in trained if (name in decayed) is decays] for decays in (True, False)]


def _problem(checkpoint: PastCheckpoint, found: Groups) -> str:
    """In what the states do not fit the parameters; empty if they do."""
    saved = [[len(group["params"]) for group in state["param_groups"]] for state in checkpoint.optimizers]
    here = [[len(group) for group in groups] for groups in found]
    if saved != here:
        return f"its optimizers have groups of {saved} parameters, but those that are known for this model {here}"
    for state, groups in zip(checkpoint.optimizers, found, strict=True):
        for group, parameters in zip(state["param_groups"], groups, strict=True):
            for number, parameter in zip(group["params"], parameters, strict=True):
                held = state["state"].get(number, {})
                shapes = {
                    tuple(held[each].shape)
                    for each in _OF_A_PARAMETER
                    if isinstance(held, Mapping) and isinstance(held.get(each), Tensor)
                }
                if shapes - {tuple(parameter.shape)}:
                    return (
                        f"its optimizers hold a state of shape {shapes.pop()} for a weight of {tuple(parameter.shape)}"
                    )
    return ""
