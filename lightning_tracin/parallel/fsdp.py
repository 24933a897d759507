"""Modules whose weights FSDP spreads over the processes: their names, their forward pass, and their weights as a whole.

Every forward pass, every backward pass and every look at a whole weight is then an act of all processes together, so
each of them must make as many as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_tracin.parallel.processes import Processes

# What FSDP and activation checkpointing put around a layer, by the attribute that holds the layer.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_Result = TypeVar("_Result")


def clean(name: str) -> str:
    """A layer's or parameter's dotted name as it was before the module was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer itself, whatever is put around it."""
    for name in _WRAPPERS:
        if name in layer._modules:
            return unwrapped(getattr(layer, name))
    return layer


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP holds the weights of a module, or of parts of it."""
    return bool(_fsdp_parts(module))


def require_spread(module: nn.Module) -> None:
    """Check that all FSDP parts of a module do spread their weights: it cannot gather others after such passes as ours.

    Raises:
        ValueError: if one does not.
    """
    if any(part.sharding_strategy.name == "NO_SHARD" for part in _fsdp_parts(module)):
        raise ValueError(
            "FSDP leaves the weights whole here: there is one device to a group, or sharding_strategy is NO_SHARD. "
            'Use strategy="ddp", or with one device no strategy.'
        )


def require_automatic(module: nn.Module) -> None:
    """Check that a module whose weights are spread does not optimize manually.

    Raises:
        ValueError: if it does: its backward passes inside of FSDP's forward pass leave no state to compute from.
    """
    if is_fsdp(module) and not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} optimizes manually in training_step, so that FSDP never ends a pass and cannot "
            'give its weights as a whole. Use automatic optimization, or strategy="ddp".'
        )


def cast_to(module: nn.Module) -> set[torch.dtype]:
    """The types that FSDP casts weights to for a forward pass (its ``mixed_precision``); none without FSDP."""
    return {part.mixed_precision.param_dtype for part in _fsdp_parts(module)} - {None}


def forwarded(module: nn.Module, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a function that calls the module, as a forward pass of what FSDP has put around it.

    FSDP gathers weights at the beginning of its own forward pass. Without FSDP, this is a plain call.
    """
    outermost = _outermost(module)
    if outermost is module:
        return function(*arguments)

    own = module.forward

    def forward(*moved: Any) -> _Result:
        module.forward = own  # the function calls it
        return function(*moved)

    module.forward = forward
    try:
        result: _Result = outermost(*arguments)
    finally:
        module.forward = own
    return result


def whole_state(module: nn.Module) -> Mapping[str, Any]:
    """The module's state dict with whole weights: on the first process; others of an FSDP module may have nothing.

    Every process must call it.
    """
    if not is_fsdp(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    outermost = _outermost(module)
    # to the CPU, one wrapped part after the other; where that is where they are, PyTorch frees memory still in use
    offload = all(part.compute_device.type != "cpu" for part in _fsdp_parts(module))
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state = get_model_state_dict(outermost, options=options)
    for names in parameter_names(module).values():  # tied weights are given once for each of their names
        state.update({name: state[names[0]] for name in names[1:] if names[0] in state})
    return state


def load_whole(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give an FSDP module whole weights, of which each process keeps its part. Every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(_outermost(module), dict(weights), options=options)


@contextmanager
def parts_kept(module: nn.Module) -> Iterator[None]:
    """Give an FSDP module back the part of its weights, and the buffers, that this process had."""
    kept = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


def joined(piece: Tensor | None, shape: torch.Size | None, processes: Processes) -> Tensor | None:
    """A tensor of a parameter's shape from the pieces that the processes' optimizers hold of it; None if none does.

    Args:
        piece: this process's, or None if it has none.
        shape: of the whole, as the first process knows it.
        processes: every one of them must call it.
    """
    gathered = processes.gather((piece, shape))
    pieces = [each.flatten() for each, _ in gathered if each is not None]
    whole: torch.Size = gathered[0][1]
    # pieces are in the order of the ranks; where there are replicas (HYBRID_SHARD), later ranks repeat the first
    return torch.cat(pieces)[: whole.numel()].view(whole) if pieces else None


def synchronized_batches(
    loader: Any, n_batches: int, spare: Callable[[], Any], processes: Processes
) -> Iterator[tuple[Any, bool]]:
    """Batches for as many forward passes as the process with most batches makes, and whether each is a loader's own.

    An error of any process's loader is raised in all of them.

    Args:
        loader: this process's.
        n_batches: how many of its batches to take.
        spare: gives a batch where there are no more.
        processes: every one of them must iterate.
    """
    batches = iter(loader)
    for number in range(max(processes.gather(n_batches))):
        own = number < n_batches
        with processes.synchronized():
            batch = next(batches) if own else spare()
        yield batch, own


def parameter_names(module: nn.Module) -> dict[int, list[str]]:
    """Each parameter's names by its id: more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean(name))
    return names


def _outermost(module: nn.Module) -> nn.Module:
    """What FSDP has put around a LightningModule; the module itself where it has not."""
    try:
        outer = module.trainer.model  # type: ignore[union-attr]
    except (RuntimeError, AttributeError):  # how Lightning says that the module has no trainer
        return module
    return outer if isinstance(outer, nn.Module) and _is_fsdp(outer) and unwrapped(outer) is module else module


def _fsdp_parts(module: nn.Module) -> list[Any]:
    return [part for part in _outermost(module).modules() if _is_fsdp(part)]


def _is_fsdp(part: nn.Module) -> bool:
    return type(part).__name__ == "FullyShardedDataParallel"
