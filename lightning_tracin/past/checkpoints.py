"""What the checkpoints of a run that is over hold: Lightning's files, state dicts, folders of Hugging Face's Trainer.

No code in a file is run, and nothing that it says is believed before it has the types that it should have.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_tracin.gradients.printable import enumerated, printable
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.files import open_tensors, status_of
from lightning_tracin.storage.own_files import has_trace
from lightning_tracin.storage.trace import Trace

_MOST_STEPS = 999_999_999

_NAMED = 5  # files that a message names

# Before it, torch.load(weights_only=True) can be made to run code that is in the file (CVE-2025-32434).
_SAFE_TORCH = "2.6"

WHAT_TO_PASS = (
    "Pass .ckpt files of Lightning, checkpoint folders of Hugging Face's Trainer, state dicts (.pt, .safetensors, or "
    "objects), or a trace."
)


@dataclass(frozen=True)
class PastCheckpoint:
    """What is known of a checkpoint.

    Attributes:
        name: of the file, for messages.
        weights: gives the state dict.
        step: optimizer steps up to it; None if it does not tell.
        epoch: the epoch that it was taken in.
        optimizers: the state dict of each optimizer.
        schedulers: the state dict of each learning rate scheduler.
        of_trainer: whether Hugging Face's Trainer saved it.
        logged: of that one, the learning rates that were logged, each with the steps done.
        max_steps: of that one, how many steps the run was to make.
        recorded: the checkpoint of a trace that it is.
        rate: the learning rate that was given for it.
    """

    name: str
    weights: Callable[[], Mapping[str, Tensor]]
    step: int | None = None
    epoch: int = 0
    optimizers: tuple[Mapping[str, Any], ...] = ()
    schedulers: tuple[Mapping[str, Any], ...] = ()
    of_trainer: bool = False
    logged: tuple[tuple[int, float], ...] = ()
    max_steps: int | None = None
    recorded: Checkpoint | None = None
    rate: float | None = None

    @property
    def number(self) -> int:
        """Its step, which :func:`in_order` has made sure of."""
        assert self.step is not None
        return self.step


def read_checkpoint(source: Any, number: int, folder: Callable[[Path], list[PastCheckpoint]]) -> list[PastCheckpoint]:
    """What is known of a checkpoint, or of several in a folder or a trace.

    Args:
        source: a file or folder, a state dict, or a trace.
        number: its place among those that were passed, to name it by.
        folder: reads a folder that is no trace.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, or no checkpoint.
        TypeError: if it is nothing of the kind.
    """
    if isinstance(source, Trace):
        return _of_trace(source)
    if isinstance(source, Mapping):
        return [_from_content(source, f"state dict {number}")]
    if not isinstance(source, (str, Path)):
        raise TypeError(f"checkpoints[{number}] is a {type(source).__name__}, which is no checkpoint. {WHAT_TO_PASS}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path.absolute()}. {WHAT_TO_PASS}")
    if has_trace(path):
        return _of_trace(Trace(path))
    if path.is_dir():
        return folder(path)
    if path.suffix == ".safetensors":
        status_of(path)
        return [PastCheckpoint(str(path), lambda: safe_tensors(path))]
    return [_from_content(torch_content(path), str(path))]


def in_order(found: Sequence[PastCheckpoint], learning_rates: Sequence[float] | None) -> list[PastCheckpoint]:
    """Checkpoints in the order of the run, each with the learning rate that was given for it.

    Where none tells its step, they are in order, and numbered from 1. A file that is there twice counts once.

    Args:
        found: in the order in which they were passed, those of a folder in the order of their steps.
        learning_rates: one for each, in that order.

    Raises:
        ValueError: if there are none, if only some tell their steps, if different ones, or different rates, tell the
            same, or if not one rate is given for each.
    """
    if not found:
        raise ValueError(f"There is no checkpoint to make a trace of. {WHAT_TO_PASS}")
    traces = {None if each.recorded is None else each.recorded.trace_path for each in found}
    if traces != {None} and len(traces) > 1:
        raise ValueError("Of several traces, or a trace and other checkpoints, no trace can be made: pass one alone.")
    if learning_rates is not None:
        if len(learning_rates) != len(found):
            raise ValueError(
                f"learning_rates must give one for each of the {len(found)} checkpoints, but got "
                f"{len(learning_rates)}: {enumerated([each.name for each in found], _NAMED)}."
            )
        found = [replace(each, rate=rate) for each, rate in zip(found, learning_rates, strict=True)]
    silent = [each.name for each in found if each.step is None]
    if len(silent) == len(found):
        return [replace(each, step=number) for number, each in enumerate(found, start=1)]
    if silent:
        raise ValueError(
            f"{enumerated(silent, _NAMED)} do not tell which step they are of, but others do: their order cannot be "
            "known. Pass checkpoints of one kind."
        )
    by_step = sorted(found, key=lambda each: each.number)
    if len({each.rate for each in found}) > 1 and [each.step for each in by_step] != [each.step for each in found]:
        given = [f"{each.rate:g} for {each.name} (step {each.step})" for each in found]
        rank_zero_warn(
            "The learning rates go to the checkpoints in the order in which these were passed, which is not that of "
            f"their steps: {enumerated(given, _NAMED)}. Names that are sorted as text have 10 before 9."
        )
    ordered: list[PastCheckpoint] = []
    for each in by_step:
        if ordered and ordered[-1].step == each.step:
            _require_same(ordered[-1], each)
            rank_zero_info(f"{each.name} is {ordered[-1].name} once more, and counts once.")
        else:
            ordered.append(each)
    return ordered


def _require_same(one: PastCheckpoint, other: PastCheckpoint) -> None:
    """Check that two checkpoints of one step are the same.

    Raises:
        ValueError: if they are not, or were given different learning rates.
    """
    a, b = one.weights(), other.weights()
    if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
        raise ValueError(
            f"{one.name} and {other.name} are both of step {one.step}, but their weights differ: pass the checkpoints "
            "of one run."
        )
    if one.rate != other.rate:
        raise ValueError(
            f"{one.name} and {other.name} are the same checkpoint, of step {one.step}, but learning_rates gives them "
            f"{one.rate:g} and {other.rate:g}: pass it once."
        )


def torch_content(path: Path) -> Any:
    """What ``torch.save`` wrote to a file, memory-mapped where its form allows; no code in it is run.

    Raises:
        ValueError: if it is damaged, holds objects that only unpickling would give, or if this torch cannot read it
            without running what may be in it.
    """
    status_of(path)
    _require_safe_torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|class (\S+)|(?:function|type) ([\w.]+\.\w+)", str(error))
        if named is None:
            raise ValueError(f"{path} is damaged, or is no checkpoint: {first_line(error)}.") from error
        name = printable(next(each for each in named.groups() if each)).rstrip(".,")
        raise ValueError(
            f"{path} holds an object of {name}, which only unpickling would give, and that may run any code: it is "
            "refused. If you trust the file, allow that class by torch.serialization.add_safe_globals, or save again "
            'what is needed: the entries "state_dict", "optimizer_states", "lr_schedulers", "global_step" and "epoch".'
        ) from error
    except Exception as error:  # what torch raises on a damaged file is of many kinds
        if isinstance(error, MemoryError):
            raise
        raise ValueError(f"{path} is damaged, or is no checkpoint: {first_line(error)}.") from error


def _require_safe_torch(path: Path) -> None:
    """Check that reading what ``torch.save`` wrote runs no code.

    Raises:
        ValueError: if it can.
    """
    if torch.__version__ < _SAFE_TORCH:
        raise ValueError(
            f"{path} is not read: with torch {torch.__version__}, a file of torch.save can run any code when it is "
            f"loaded (CVE-2025-32434). Update torch to {_SAFE_TORCH} or newer; or save the weights as safetensors "
            "(safetensors.torch.save_file) and pass that file, with learning_rates=[...]. If you trust the file, load "
            "it yourself and pass what torch.load returns."
        )


def safe_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return open_tensors(path)[0]
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or is no safetensors file: {first_line(error.__cause__)}.") from error


def tensors_of_state(content: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(content, Mapping) or not all(isinstance(each, str) for each in content):
        raise ValueError(f"{name} holds no state dict, but {type(content).__name__}. {WHAT_TO_PASS}")
    tensors = {key: value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        entries = f", but {enumerated(list(content), _NAMED)}" if content else ""
        raise ValueError(f"{name} holds no weights{entries}. {WHAT_TO_PASS}")
    return tensors


def states_of(content: Any, name: str, kind: str) -> tuple[Mapping[str, Any], ...]:
    """The state dicts of optimizers or schedulers.

    Raises:
        ValueError: if they are none.
    """
    states = [] if content is None else content
    if not isinstance(states, Sequence) or not all(isinstance(each, Mapping) for each in states):
        raise ValueError(f"{name} is damaged: its {kind} are no list of state dicts.")
    for state in states if kind == "optimizers" else ():
        _check_optimizer(state, name)
    return tuple(states)


def _check_optimizer(state: Mapping[str, Any], name: str) -> None:
    """Check the parts of an optimizer's state dict that are used.

    Raises:
        ValueError: if one is not what it should be.
    """
    groups, held = state.get("param_groups"), state.get("state")
    listed = isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)
    if not listed or not isinstance(held, Mapping) or not all(isinstance(g.get("params"), list) for g in groups or ()):
        raise ValueError(f"{name} is damaged: an optimizer's state has no parameter groups.")
    for group in groups or ():
        if group.get("lr", ...) is not None:  # None is that of an optimizer that finds its rates by itself
            _finite(group.get("lr"), f"{name} is damaged: the lr of a parameter group")
        for beta in group.get("betas", ()) if isinstance(group.get("betas", ()), (list, tuple)) else (None,):
            _finite(beta, f"{name} is damaged: betas of a parameter group")
    for of_parameter in held.values():
        if not isinstance(of_parameter, Mapping):
            raise ValueError(f"{name} is damaged: an optimizer's state of a parameter is no mapping.")
        _finite(of_parameter.get("step", 0), f"{name} is damaged: the step of an optimizer")
        moments = of_parameter.get("exp_avg_sq")
        if moments is not None and not (isinstance(moments, Tensor) and moments.is_floating_point()):
            raise ValueError(f"{name} is damaged: exp_avg_sq of an optimizer is no tensor of numbers.")


def step_of(value: Any, name: str) -> int:
    """A number of steps or epochs.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_STEPS:
        raise ValueError(f"{name} is damaged: {printable(repr(value))[:40]} is no number of steps or epochs.")
    return value


def _from_content(content: Any, name: str) -> PastCheckpoint:
    """A checkpoint of Lightning, or a plain state dict."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        # Where Lightning's WeightAveraging saved the average as state_dict, the weights that were trained are these.
        tensors = tensors_of_state(content.get("current_model_state", content["state_dict"]), name)
        return PastCheckpoint(
            name,
            lambda: tensors,
            step=step_of(content["global_step"], name) if "global_step" in content else None,
            epoch=step_of(content.get("epoch", 0), name),
            optimizers=states_of(content.get("optimizer_states"), name, "optimizers"),
            schedulers=states_of(content.get("lr_schedulers"), name, "schedulers"),
        )
    tensors = tensors_of_state(content, name)
    return PastCheckpoint(name, lambda: tensors)


def _of_trace(trace: Trace) -> list[PastCheckpoint]:
    """The checkpoints of a trace, of which none may be missing."""
    checkpoints = trace.checkpoints
    trace.check_whole(checkpoints)
    return [PastCheckpoint(str(each.path), each.weights, each.step, each.epoch, recorded=each) for each in checkpoints]


def _finite(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several numbers
        number = math.nan
    if not math.isfinite(number) or abs(number) > 1e30:  # as schemas.Rate
        raise ValueError(f"{what} must be a number, but got {printable(repr(value))[:40]}.")
    return number


def first_line(error: BaseException | None) -> str:
    """What an error says, in a line of limited length."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0]).rstrip(".")[:300]
