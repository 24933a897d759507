"""Finding the layers that gradients are taken at, and naming them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.linear_layers import LINEAR_LAYERS, is_linear
from lightning_tracin.gradients.sites import Site
from lightning_tracin.parallel.fsdp import unwrapped, unwrapped_name

EMBEDDING_ADVICE = "Return the word embedding layer from influence_embedding_layer() of the module"

LAST_ADVICE = "Return the last layer from influence_last_layer() of the module"


def find_embedding_layer(module: nn.Module) -> nn.Module:
    """The word embedding layer: a Hugging Face model's own answer, else the only ``nn.Embedding``.

    Raises:
        ValueError: if there is none, or more than one; the message lists the candidates by name.
    """
    candidates = _hugging_face_embeddings(module) or [
        part for part in module.modules() if isinstance(part, nn.Embedding)
    ]
    unique = list({id(getattr(part, "weight", part)): part for part in candidates}.values())
    if len(unique) == 1:
        return unique[0]
    if not unique:
        raise ValueError(
            f"{type(module).__name__} has no embedding layer, which TracIn-WE needs. {EMBEDDING_ADVICE}, or use "
            'methods=("tracin-last",) in TracInCallback and method="tracin-last" in influence.'
        )
    raise ValueError(
        f"{type(module).__name__} has {len(unique)} candidates for the word embedding layer: "
        f"{_listed(module, unique)}. {EMBEDDING_ADVICE}."
    )


def layers_sharing_table(module: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The layer, and the other embedding layers of the module whose table is the same tensor (encoder and decoder)."""
    weight = getattr(layer, "weight", None)
    inside = set(layer.modules())  # peft's layer holds the one that it wraps
    tied = [part for part in module.modules() if isinstance(part, nn.Embedding) and part.weight is weight]
    return [layer, *(part for part in tied if part not in inside)]


@dataclass(frozen=True)
class SiteLayers:
    """A site on a module.

    Attributes:
        site: the site.
        layers: its layer; at the word embedding table, all layers that share the table.
    """

    site: Site
    layers: tuple[nn.Module, ...]


def sites_on_module(module: nn.Module, sites: Sequence[Site]) -> list[SiteLayers]:
    """Sites with their layers in a module.

    Raises:
        AttributeError: if the module has no layer of a site's name.
    """
    found = []
    for site in sites:
        layer = named_layer(module, site.layer)
        found.append(SiteLayers(site, tuple(layers_sharing_table(module, layer)) if site.has_words else (layer,)))
    return found


def linear_layers_named(module: nn.Module, pattern: str) -> list[str]:
    """The dotted names of the linear and convolution layers that a name, or a pattern with ``*``, stands for.

    Raises:
        ValueError: if there is none; the message lists what is there.
    """
    linear = [unwrapped_name(name) for name, part in module.named_modules() if is_linear(part)]
    found = list(dict.fromkeys(name for name in linear if fnmatchcase(name, pattern)))
    if found:
        return found
    inside = [name for name in linear if name.startswith(f"{pattern}.")]  # peft's layers hold several
    near = inside or get_close_matches(pattern, linear, n=3, cutoff=0) or ["none"]
    raise ValueError(
        f"methods names {pattern!r}, but {type(module).__name__} has no {LINEAR_LAYERS} of that name. "
        f"{'Inside of it are' if inside else 'The nearest are'}: {', '.join(near[:5])}."
    )


def called_layers(losses: Callable[[], Tensor], layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Of some layers those that are called when losses are computed."""
    called: set[nn.Module] = set()
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda layer, *_: called.add(layer)).remove)
        losses()
    return called


def find_last_layer(module: nn.Module) -> nn.Linear:
    """The last linear layer: a Hugging Face model's output embedding, else the ``nn.Linear`` registered last.

    Raises:
        ValueError: if there is none.
    """
    for part in module.modules():
        outputs = _called(part, "get_output_embeddings")
        if isinstance(outputs, nn.Module) and isinstance(unwrapped(outputs), nn.Linear):
            return unwrapped(outputs)  # type: ignore[return-value]
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(module).__name__} has no nn.Linear, which TracIn-Last needs. {LAST_ADVICE}.")
    return linears[-1]


def find_layers_before_loss(module: nn.Module, losses: Callable[[], Tensor]) -> list[nn.Linear]:
    """The linear layers whose output reaches the loss through no other linear layer, from one forward pass.

    This is what "last" means when layers are registered in another order than they run in.

    Raises:
        ValueError: if a checkpoint with ``use_reentrant=True``, which hides its layers, comes before them.
    """
    layer_of: dict[Any, nn.Linear] = {}

    def record(layer: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
        layer_of[output.grad_fn] = layer  # type: ignore[assignment]
        return output

    handles = [part.register_forward_hook(record) for part in module.modules() if isinstance(part, nn.Linear)]
    try:
        total = losses().sum()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, nn.Linear] = {}
    seen: set[Any] = set()
    nodes = [total.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                f"{type(module).__name__} computes a part in torch.utils.checkpoint with use_reentrant=True, where "
                "gradients of examples cannot be taken. Use use_reentrant=False."
            )
        seen.add(node)
        if node in layer_of:
            found[id(layer_of[node])] = layer_of[node]
        else:
            nodes.extend(following for following, _ in node.next_functions)
    return list(found.values())


def only_layer_before_loss(module: nn.Module, losses: Callable[[], Tensor]) -> nn.Linear:
    """The linear layer that alone feeds the loss.

    Raises:
        ValueError: if there is none, or several; the message lists them by name.
    """
    layers = find_layers_before_loss(module, losses)
    if len(layers) == 1:
        return layers[0]
    if not layers:
        raise ValueError(
            f"No nn.Linear of {type(module).__name__} feeds the losses, or influence_loss detaches them. {LAST_ADVICE}."
        )
    raise ValueError(
        f"{len(layers)} linear layers of {type(module).__name__} feed the loss directly: "
        f"{_listed(module, list(layers))}. {LAST_ADVICE}."
    )


def layer_name(module: nn.Module, layer: nn.Module) -> str:
    """The layer's dotted name inside the module.

    Raises:
        ValueError: if the layer is not part of the module.
    """
    name: str
    for name, part in module.named_modules():
        if part is layer:
            return unwrapped_name(name)
    raise ValueError(f"The layer {layer} is not a part of {type(module).__name__}; return one that is.")


def named_layer(module: nn.Module, name: str) -> nn.Module:
    """The layer of a dotted name that :func:`layer_name` gave, whatever is put around it or around what holds it.

    Raises:
        AttributeError: if there is none.
    """
    layer = module
    for part in name.split("."):
        layer = unwrapped(layer).get_submodule(part)
    return unwrapped(layer)


def _hugging_face_embeddings(module: nn.Module) -> list[nn.Module]:
    """What the outermost parts that have ``get_input_embeddings`` say it is."""
    answers: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        if id(part) in inside:
            continue
        layer = _called(part, "get_input_embeddings")
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Module) and isinstance(weight, Tensor) and weight.dim() <= 2:  # 1: FSDP's part of it
            answers.append(unwrapped(layer))
            inside.update(id(child) for child in part.modules())
    return answers


def _called(part: nn.Module, method: str) -> Any:
    """What a Hugging Face model's getter returns; None where it has no such layer."""
    getter = getattr(part, method, None)
    if not callable(getter):
        return None
    try:
        return getter()
    except (NotImplementedError, AttributeError):  # how transformers says that a model has none
        return None


def _listed(module: nn.Module, layers: list[nn.Module]) -> str:
    return ", ".join(
        f"{layer_name(module, layer)} ({tuple(weight.shape)})"
        if isinstance(weight := getattr(layer, "weight", None), torch.Tensor)
        else layer_name(module, layer)
        for layer in layers
    )
