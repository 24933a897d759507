"""A checkpoint as it is recorded: the weights, the optimizers' second moments, the rates since the one before."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.layers import named_layer
from lightning_tracin.gradients.linear_layers import as_matrix
from lightning_tracin.gradients.second_moments import SecondMoments
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import is_fsdp, joined, parameter_names, whole_state
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage.checkpoint import WEIGHTS, Checkpoint, Step, moments_file
from lightning_tracin.storage.files import appearing_folder, write_json, write_tensors
from lightning_tracin.storage.trace import Trace


@contextmanager
def new_checkpoint(
    trace: Trace,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    epoch: int,
    steps: list[Step],
    processes: Processes = ALONE,
) -> Iterator[Checkpoint]:
    """Record a checkpoint. It joins the trace, whole, when all processes leave the context without an exception.

    Raises:
        FileNotFoundError: if the trace is no longer in its folder.
        ValueError: if another is in its place.
    """
    with processes.synchronized():
        if processes.first:
            trace.check_in_place()  # the lock is nothing to a person who moves folders
    names = parameter_names(module)
    groups = [
        [[name for weight in group["params"] for name in names.get(id(weight), [])] for group in each.param_groups]
        for each in optimizers
    ]
    content: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "step": step,
        "epoch": epoch,
        "steps": steps,
        "groups": groups,
    }
    with appearing_folder(trace.path / "checkpoints" / f"step-{step:09d}", processes) as folder:
        content["checksums"] = _write_weights_and_moments(trace, folder, module, optimizers, processes)
        if processes.first:
            write_json(folder / "checkpoint.json", content)
        content = processes.gather(content)[0]
        yield Checkpoint(path=folder, sites=trace.sites, **content)


def _write_weights_and_moments(
    trace: Trace,
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    processes: Processes,
) -> dict[str, str]:
    """Let the first process write the weights and the sites' second moments; the files' checksums by name."""
    state = whole_state(module)
    holders = processes if is_fsdp(module) else ALONE  # of a weight
    moments = {
        moments_file(site): _second_moments_at(site, module, optimizers, state, holders)
        for site in trace.sites
        if processes.first or holders.size > 1
    }
    if not processes.first:
        return {}
    checksums = {WEIGHTS: _write_weights(folder / WEIGHTS, state)}
    for name, of_site in moments.items():
        if of_site is not None:
            checksums[name] = _write_moments(folder / name, of_site)
    return checksums


def _write_weights(path: Path, state: Mapping[str, Any]) -> str:
    """Write a state dict's tensors, those that share memory once, and return the file's checksum."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        place = (value.device, value.data_ptr(), value.shape, value.stride())
        if value.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            storage = value.untyped_storage().data_ptr()
            tensors[name] = value.detach().cpu() if storage not in storages else value.detach().cpu().clone()
            storages.add(storage)
    return write_tensors(path, tensors, tied)


def _second_moments_at(
    site: Site,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
    holders: Processes,
) -> SecondMoments | None:
    """Adam's bias-corrected second moments of the weight and bias of a site's layer; of words, rows that have any.

    Args:
        site: names the layer.
        module: that the optimizers train.
        optimizers: those of the fit.
        state: the module's state dict, with whole weights.
        holders: the processes that each hold a part of every weight.
    """
    layer, names = named_layer(module, site.layer), parameter_names(module)
    columns: list[Tensor] = []
    eps = 0.0
    for kind in ("weight", "bias"):
        parameter = getattr(layer, kind, None)
        if parameter is None:
            continue
        corrected, eps = _second_moment(parameter, optimizers)
        if holders.size > 1:
            whole = state.get(names[id(parameter)][0])
            corrected = joined(corrected, None if whole is None else whole.shape, holders)
        if corrected is None:
            return None
        columns.append(corrected[:, None] if corrected.dim() == 1 else as_matrix(layer, corrected))
    if not columns:
        return None
    values = torch.cat(columns, dim=1)
    rows = torch.nonzero(values.any(dim=1))[:, 0] if site.has_words else None
    return SecondMoments(values if rows is None else values[rows], rows, eps)


def _second_moment(parameter: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Tensor | None, float]:
    """Adam's bias-corrected second moment of a parameter, if an optimizer has one, and its epsilon."""
    groups = [
        (optimizer.state.get(parameter, {}), group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
        and "betas" in group
        and isinstance(group.get("eps"), (int, float))  # Adafactor and its like have several
    ]
    for state, group in groups:
        if "exp_avg_sq" in state and "step" in state:  # without the step, the bias cannot be corrected
            corrected = state["exp_avg_sq"].float().cpu() / (1 - group["betas"][1] ** float(state["step"]))
            return corrected, group["eps"]
    return None, max((float(group["eps"]) for _, group in groups), default=0.0)


def _write_moments(path: Path, moments: SecondMoments) -> str:
    tensors = {"values": moments.values}
    if moments.rows is not None:
        tensors["rows"] = moments.rows
    return write_tensors(path, tensors, {"eps": repr(moments.eps)})
