"""Recording a checkpoint: its weights, Adam's second moments, and the learning rates since the previous checkpoint."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.parallel.fsdp import full_state_dict, is_fsdp, unwrapped_name
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.checkpoint import DRAWN, WEIGHTS, Checkpoint
from lightning_tracin.storage.files import atomic_folder, write_tensors
from lightning_tracin.storage.frozen import share_frozen
from lightning_tracin.storage.layouts import shapes_of
from lightning_tracin.storage.schemas import CheckpointFile, Step, write
from lightning_tracin.storage.second_moments import moments_file, second_moments_at
from lightning_tracin.storage.summed_steps import summed_up
from lightning_tracin.storage.trace import Trace


@contextmanager
def new_checkpoint(
    trace: Trace,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    epoch: int,
    previous: str | None,
    steps: list[Step],
    groups: list[list[list[str]]],
    drawn: Tensor | None = None,
    keep_weights: bool = True,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    processes: Processes = ALONE,
) -> Iterator[Checkpoint]:
    """Record a checkpoint; it becomes part of the trace when all processes leave the context without an exception.

    Inside the context, gradients may be stored in the checkpoint's folder.

    Args:
        trace: the trace to record to.
        module: the module that is trained.
        optimizers: the optimizers of the fit.
        step: ``trainer.global_step``.
        epoch: ``trainer.current_epoch``.
        previous: id of the checkpoint before; None for the first one.
        steps: the optimizer steps since the previous checkpoint.
        groups: the parameter names of each group of each optimizer that made some.
        drawn: (n_train,) bool, the examples that were trained on since then; None if all were, or if it is not known.
        keep_weights: whether to store the weights.
        shapes: those of the state dict that the trace was begun with, by name; None if they are not known.
        processes: the processes of the fit; every one of them must enter the context.

    Raises:
        FileNotFoundError: if the trace, or a checkpoint of it, is no longer in its folder.
        ValueError: if another trace has replaced it, or if the state dict has other names or shapes by now.
    """
    shared: dict[str, str] = {}
    with processes.synchronized():
        if processes.first:
            trace.check_in_place()  # The lock means nothing to a person who moves folders.
            recorded = trace.checkpoints
            trace.check_whole(recorded)
            if (recorded[-1].id if recorded else None) != previous:
                raise FileNotFoundError(
                    f"The last checkpoint in {trace.path} was removed while the fit was running. Restore it from a "
                    "copy, or fit again."
                )
            shared = recorded[-1].shared if recorded else {}
    stored_steps, repeats = summed_up(steps)
    content: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "step": step,
        "epoch": epoch,
        "previous": previous,
        "steps": stored_steps,
        "repeats": repeats,
        "groups": groups,
        "keeps_weights": keep_weights,
    }
    with atomic_folder(trace.path / "checkpoints" / f"step-{step:09d}", processes) as folder:
        state = full_state_dict(module)
        if processes.first and shapes is not None:
            _require_shapes(state, shapes)
        content["checksums"] = _write_moments(trace, folder, module, optimizers, state, processes)
        if processes.first:
            if keep_weights:
                content["checksums"] |= write_weights(folder, trace.path, state, frozen_names(module), shared)
            if drawn is not None:
                content["checksums"][DRAWN] = write_tensors(folder / DRAWN, {"drawn": drawn})
            write(folder / "checkpoint.json", CheckpointFile(**content))
        del state  # of sharded weights it is a copy
        content = processes.gather(content)[0]
        yield Checkpoint(path=folder, header=trace.header, **content)


def _require_shapes(state: Mapping[str, Any], begun_with: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a state dict has the names and shapes that it had when the trace was begun.

    Raises:
        ValueError: if it has others, with which the trace could not be read.
    """
    now = shapes_of(state)
    changed = sorted(name for name in now.keys() | begun_with.keys() if now.get(name) != begun_with.get(name))
    if not changed:
        return
    both = [(name, _told(begun_with.get(name)), _told(now.get(name))) for name in changed[:3]]
    listed = "; ".join(f"{name}: {before} then, {after} now" for name, before, after in both)
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise ValueError(
        "The module's state dict has changed since the fit began, but a trace holds the same tensors at each "
        f"checkpoint ({listed}{more}). A buffer that grows, or comes during training, needs "
        "register_buffer(..., persistent=False), or its full size from the start; prune (ModelPruning renames weights) "
        "before the fit, not in it."
    )


def _told(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {shape}"


def _write_moments(
    trace: Trace,
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
    processes: Processes,
) -> dict[str, str]:
    """Write the sites' second moments, in the first process.

    Returns:
        The checksum of each file by its name; an empty dictionary in the other processes.
    """
    holders = processes if is_fsdp(module) else ALONE
    moments_by_file = {
        moments_file(site): second_moments_at(site, module, optimizers, state, holders)
        for site in trace.sites
        if processes.first or holders.size > 1
    }
    if not processes.first:
        return {}
    return {name: moments.write(folder / name) for name, moments in moments_by_file.items() if moments is not None}


def write_weights(
    folder: Path, trace: Path, state: Mapping[str, Any], frozen: Collection[str], shared: Mapping[str, str]
) -> dict[str, str]:
    """Write a state dict's weights, tied ones once, and frozen ones where checkpoints share them.

    Args:
        folder: of the checkpoint.
        trace: the folder of the trace.
        state: the module's state dict.
        frozen: names of those that no gradient moves.
        shared: the checksums of the files that the checkpoint before shares, by name.

    Returns:
        The checksum of each file by its name.
    """
    tensors, tied = _untied(state)
    checksums = share_frozen(folder, trace, tensors, frozen, shared)
    checksums[WEIGHTS] = write_tensors(folder / WEIGHTS, tensors, tied)
    return checksums


def _untied(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict's tensors, tied ones once, and of each further name of a tied one that under which it stands."""
    tied = tied_names(state)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()  # safetensors refuses two tensors in one storage, so the second is cloned
    for name, value in state.items():
        if isinstance(value, Tensor) and name not in tied:
            storage = value.untyped_storage().data_ptr()
            tensors[name] = value.detach().cpu() if storage not in storages else value.detach().cpu().clone()
            storages.add(storage)
    return tensors, tied


def tied_names(state: Mapping[str, Any]) -> dict[str, str]:
    """The further names of a state dict's tied tensors, with the name that each first stands under.

    Raises:
        ValueError: if there are sparse tensors, which safetensors cannot hold.
    """
    sparse = sorted(name for name, each in state.items() if isinstance(each, Tensor) and each.layout != torch.strided)
    if sparse:
        raise ValueError(
            f"{', '.join(sparse[:3])} in the module's state dict {'is' if len(sparse) == 1 else 'are'} no dense tensor "
            f"({state[sparse[0]].layout}), which a trace cannot store. Make a buffer that never changes in __init__, "
            "and leave it out of the state dict by register_buffer(..., persistent=False); or keep it dense."
        )
    tied: dict[str, str] = {}
    name_at: dict[Any, str] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel():
            first = name_at.setdefault((value.device, value.data_ptr(), value.shape, value.stride()), name)
            if first != name:
                tied[name] = first
    return tied


def frozen_names(module: nn.Module) -> set[str]:
    """The names of the parameters that need no gradient."""
    return {
        unwrapped_name(name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
