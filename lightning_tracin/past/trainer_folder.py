"""The folders that Hugging Face's Trainer saves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from lightning_tracin.past.checkpoints import (
    WHAT_TO_PASS,
    PastCheckpoint,
    safe_tensors,
    states_of,
    step_of,
    tensors_of_state,
    torch_content,
)
from lightning_tracin.storage.files import damage_named, json_bytes

_REPAIR = "Restore the file from a copy."

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class _Logged(msgspec.Struct, frozen=True):
    """An entry of ``log_history``, which holds whatever else was logged."""

    step: int = -1
    learning_rate: float | None = None


class _TrainerState(msgspec.Struct, frozen=True):
    """As much of ``trainer_state.json`` as is needed."""

    global_step: int
    epoch: float | None = None
    max_steps: int | None = None
    log_history: list[_Logged] = []


class _Index(msgspec.Struct, frozen=True):
    """The index of weights that lie in several files."""

    weight_map: dict[str, str]


def read_folder(path: Path) -> list[PastCheckpoint]:
    """What is known of a checkpoint in a folder, or of those in its folders ``checkpoint-*``, by their numbers.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is damaged.
    """
    if _weights_in(path) is None:
        inner = [each for each in path.glob("checkpoint-*") if each.is_dir() and re.fullmatch(r".*-\d+", each.name)]
        if not inner:
            raise FileNotFoundError(_nothing_in(path))
        return [_read(each) for each in sorted(inner, key=_number_of)]
    return [_read(path)]


def _number_of(path: Path) -> int:
    """The step in the name of a folder ``checkpoint-*``; as text, 1000 would come before 500."""
    return int(path.name.rpartition("-")[2])


def _nothing_in(path: Path) -> str:
    if (path / "adapter_model.safetensors").exists() or (path / "adapter_model.bin").exists():
        return (
            f"{path} holds the weights of adapters alone. Load them into the model, and pass its whole state dict, "
            "model.state_dict(), as checkpoint, with learning_rates=[...]."
        )
    return f"{path} holds neither {' nor '.join(_WEIGHTS)}. {WHAT_TO_PASS}"


def _read(path: Path) -> PastCheckpoint:
    weights = _weights_in(path)
    if weights is None:
        raise FileNotFoundError(_nothing_in(path))
    found = PastCheckpoint(str(path), weights)
    if not (path / "trainer_state.json").exists():
        return found
    state: _TrainerState = _json(path / "trainer_state.json", _TrainerState)
    optimizer, scheduler = (
        [torch_content(path / name)] if (path / name).exists() else [] for name in ("optimizer.pt", "scheduler.pt")
    )
    return PastCheckpoint(
        str(path),
        weights,
        step=step_of(state.global_step, str(path)),
        epoch=max(0, math.ceil(state.epoch or 0) - 1),  # as Lightning counts: at the end of the first, 0
        optimizers=states_of(optimizer, str(path), "optimizers"),
        schedulers=states_of(scheduler, str(path), "schedulers"),
        of_trainer=True,
        logged=tuple((each.step, each.learning_rate) for each in state.log_history if each.learning_rate is not None),
        max_steps=state.max_steps,
    )


def _weights_in(path: Path) -> Callable[[], dict[str, Tensor]] | None:
    """What reads a folder's weights, from one file or several; None if it has none."""
    for name in _WEIGHTS:
        if (path / name).exists():
            return partial(_weights_of, [path / name])
        if (path / f"{name}.index.json").exists():
            index: _Index = _json(path / f"{name}.index.json", _Index)
            names = sorted(set(index.weight_map.values()))
            elsewhere = [each for each in names if Path(each).name != each]
            with damage_named(path / f"{name}.index.json", _REPAIR):
                if elsewhere:
                    raise ValueError(f"it names a file in another folder, {elsewhere[0]}")
            return partial(_weights_of, [path / each for each in names])
    return None


def _weights_of(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of some files."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, which holds a part of the weights.")
        is_safe = file.suffix == ".safetensors"
        tensors |= safe_tensors(file) if is_safe else tensors_of_state(torch_content(file), str(file))
    return tensors


def _json(path: Path, kind: type[Any]) -> Any:
    content = json_bytes(path)
    with damage_named(path, _REPAIR):
        parsed = json.loads(content, parse_constant=lambda _: None)  # the Trainer writes a loss that is NaN as such
        return msgspec.convert(parsed, kind)
