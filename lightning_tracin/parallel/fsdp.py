"""Modules whose weights FSDP spreads over the processes: parameter names, forward passes and full state dicts.

Every forward pass, every backward pass and every access to a full weight is then a collective operation, so all
processes must run equally many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_tracin.parallel.processes import Processes

# The attributes by which the wrappers of FSDP and of activation checkpointing refer to the layer that they wrap.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_Result = TypeVar("_Result")


def unwrapped_name(name: str) -> str:
    """A layer's or parameter's dotted name as it was before the module was wrapped."""
    return ".".join(component for component in name.split(".") if component not in _WRAPPERS)


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside any wrappers of FSDP and of activation checkpointing."""
    for name in _WRAPPERS:
        if name in layer._modules:
            return unwrapped(getattr(layer, name))
    return layer


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP wraps a module or any of its submodules."""
    return bool(_fsdp_modules(module))


def require_spread(module: nn.Module) -> None:
    """Check that FSDP spreads the weights of every submodule that it wraps.

    With NO_SHARD, FSDP cannot gather a full state dict after passes outside of the training step.

    Raises:
        ValueError: if it leaves the weights of one whole.
    """
    if any(wrapper.sharding_strategy.name == "NO_SHARD" for wrapper in _fsdp_modules(module)):
        raise ValueError(
            "FSDP leaves the weights whole here: there is one device to a group, or sharding_strategy is NO_SHARD. "
            'Use strategy="ddp", or with one device no strategy.'
        )


def require_automatic_optimization(module: nn.Module) -> None:
    """Check that a module whose weights FSDP spreads does not optimize manually.

    Backward passes inside of FSDP's forward pass leave FSDP in a state from which no full state dict can be gathered.

    Raises:
        ValueError: if it optimizes manually.
    """
    if is_fsdp(module) and not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} optimizes manually in training_step, so that FSDP never ends a pass and cannot "
            'give its weights as a whole. Use automatic optimization, or strategy="ddp".'
        )


def mixed_precision_dtypes(module: nn.Module) -> set[torch.dtype]:
    """The types that FSDP casts weights to in a forward pass (``mixed_precision``); an empty set without FSDP."""
    return {wrapper.mixed_precision.param_dtype for wrapper in _fsdp_modules(module)} - {None}


def call_in_forward_pass(module: nn.Module, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a function that runs the module, as a forward pass of the FSDP wrapper around the module.

    FSDP gathers the weights when its own forward pass starts, so the function runs inside of that. Without FSDP, this
    is a plain call.

    Args:
        module: the module that the function runs.
        function: called with ``arguments``, which FSDP has moved to the device.
        arguments: its positional arguments.
    """
    outermost = _outermost(module)
    if outermost is module:
        return function(*arguments)

    original_forward = module.forward

    def forward(*moved: Any) -> _Result:
        module.forward = original_forward  # the function calls it
        return function(*moved)

    module.forward = forward
    try:
        result: _Result = outermost(*arguments)
    finally:
        module.forward = original_forward
    return result


def full_state_dict(module: nn.Module) -> Mapping[str, Any]:
    """The module's state dict with full weights, on the first process; with FSDP it may be empty on the others.

    Every process must call it.
    """
    if not is_fsdp(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    outermost = _outermost(module)
    # Offloading keeps one wrapped submodule at a time on the device. With weights that already are on the CPU, PyTorch
    # would free memory that is still in use.
    offload = all(wrapper.compute_device.type != "cpu" for wrapper in _fsdp_modules(module))
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state = get_model_state_dict(outermost, options=options)
    for names in parameter_names(module).values():  # PyTorch returns a tied weight under one of its names
        state.update({name: state[names[0]] for name in names[1:] if names[0] in state})
    return state


def load_full_state_dict(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load full weights into an FSDP module; each process keeps its part. Every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(_outermost(module), dict(weights), options=options)


@contextmanager
def local_weights_restored(module: nn.Module) -> Iterator[None]:
    """On exit, restore this process's parts of an FSDP module's weights, and its buffers, to their values on entry."""
    saved = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)


def gathered_tensor(part: Tensor | None, shape: torch.Size | None, processes: Processes) -> Tensor | None:
    """A tensor of a parameter's shape, such as an optimizer's second moments, from the parts of all processes.

    Args:
        part: this process's part of the flattened tensor, or None if it has none.
        shape: of the full tensor; the shape that the first process passes counts.
        processes: the processes that hold the parts; every one of them must call this function.

    Returns:
        The full tensor, or None if no process has a part.
    """
    gathered = processes.gather((part, shape))
    parts = [piece.flatten() for piece, _ in gathered if piece is not None]
    full_shape: torch.Size = gathered[0][1]
    # The parts are in the order of the ranks. With replicas (HYBRID_SHARD), later ranks repeat the first ones.
    return torch.cat(parts)[: full_shape.numel()].view(full_shape) if parts else None


def synchronized_batches(
    loader: Any, n_batches: int, spare: Callable[[], Any], processes: Processes
) -> Iterator[tuple[Any, bool]]:
    """Equally many batches in every process, filled up with spare ones where a loader has fewer.

    Every forward pass of an FSDP module is collective, so the process with most batches sets their number. An error of
    any process's loader is raised in all of them.

    Args:
        loader: this process's loader.
        n_batches: how many batches to take from the loader.
        spare: returns a batch to fill up with.
        processes: every one of them must iterate.

    Yields:
        A batch, and whether it comes from the loader.
    """
    batches = iter(loader)
    for number in range(max(processes.gather(n_batches))):
        from_loader = number < n_batches
        with processes.synchronized():
            batch = next(batches) if from_loader else spare()
        yield batch, from_loader


def parameter_names(module: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, several for a tied one, by the parameter's ``id()``."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(unwrapped_name(name))
    return names


def _outermost(module: nn.Module) -> nn.Module:
    """The FSDP wrapper around a LightningModule, or the module itself if it is not wrapped."""
    try:
        outer = module.trainer.model  # type: ignore[union-attr]
    except (RuntimeError, AttributeError):  # Lightning raises these for a module without a trainer
        return module
    return outer if isinstance(outer, nn.Module) and _is_fsdp(outer) and unwrapped(outer) is module else module


def _fsdp_modules(module: nn.Module) -> list[Any]:
    return [submodule for submodule in _outermost(module).modules() if _is_fsdp(submodule)]


def _is_fsdp(module: nn.Module) -> bool:
    """Whether a module is an FSDP wrapper; by the class name, which needs no import of torch.distributed.fsdp."""
    return type(module).__name__ == "FullyShardedDataParallel"
