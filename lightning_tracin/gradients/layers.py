"""The layers that gradients are taken at: found in a module, by name and by their place in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

LAST_ADVICE = (
    'Return the last layer from influence_last_layer() of the module; or, if it has no head, leave "tracin-last" out '
    'of the methods of TracInCallback, as in methods=("tracin-we",)'
)


class NoLastLayer(ValueError):
    """A module has no head, so that no linear layer is the last one."""


def find_embedding_layer(
    module: nn.Module, losses: Callable[[], Tensor] | None = None, ids: Sequence[Tensor] = ()
) -> nn.Module:
    """The word embedding layer: a Hugging Face model's ``get_input_embeddings()``, or else the only embedding layer.

    Of several it is the one that is called with the batch's token ids, if no other one seems to read words, as those of
    positions and of segments do not. So it is where the Hugging Face model's own is not called, but given vectors.

    Args:
        module: the module.
        losses: computes the losses of a batch, with autograd on; None to call nothing.
        ids: what may be token ids in that batch.

    Raises:
        ValueError: if there is none, or more than one; the message lists the candidates by name.
    """
    own, inside = _hugging_face_embeddings(module)
    tables = [layer for layer in module.modules() if _is_embedding(layer)]
    unique = _of_own_tables(own or tables)
    sizes = {len(layer.weight) for layer in own}  # type: ignore[arg-type]
    others = [each for each in tables if own and (id(each) not in inside or len(each.weight) in sizes)]  # type: ignore[arg-type]
    every = _of_own_tables([*others, *unique])
    if losses is not None and len(every) > 1:
        inputs = _inputs_of_tables(module, losses, every)
        is_called = not own or any(inputs[layer] for layer in unique)
        unique = _reading_words(inputs, unique if is_called else every, ids) or unique
    if len(unique) == 1:
        return unique[0]
    if not unique:
        raise ValueError(
            f"{type(module).__name__} has no embedding layer, which TracIn-WE needs. {EMBEDDING_ADVICE}, or use "
            'methods=("tracin-last",) in TracInCallback and method="tracin-last" in influence.'
        )
    raise ValueError(
        f"{type(module).__name__} has {len(unique)} candidates for the word embedding layer: "
        f"{_listed(module, unique)}. {EMBEDDING_ADVICE}, as in return self.{layer_name(module, unique[0])}."
    )


def _of_own_tables(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """One layer, the last, for each table among those of some embedding layers."""
    return list({id(getattr(layer, "weight", layer)): layer for layer in layers}.values())


def _inputs_of_tables(
    module: nn.Module, losses: Callable[[], Tensor], layers: Sequence[nn.Module]
) -> dict[nn.Module, list[Tensor]]:
    """What the table of each embedding layer is called with, by whatever layer, where gradients can be taken."""
    inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as hooks:
        for layer, seen in inputs.items():

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[Tensor] = seen) -> None:
                if torch.is_grad_enabled():
                    seen.extend([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1])

            for each in layers_sharing_table(module, layer):
                hooks.callback(each.register_forward_pre_hook(record, with_kwargs=True).remove)
        losses()
    return inputs


def _reading_words(
    inputs: Mapping[nn.Module, Sequence[Tensor]], layers: Sequence[nn.Module], ids: Sequence[Tensor]
) -> list[nn.Module]:
    """Of some embedding layers that which is called with a batch's ids; all that seem to read words, if others do."""
    known = [each.flatten(0, -2) for each in ids]
    if len({each.shape[-1] for each in known}) == 1:
        known.append(torch.cat(known))

    def is_given(value: Tensor) -> bool:
        return value.dim() > 1 and any(torch.equal(value.flatten(0, -2), each) for each in known)

    given = [layer for layer in layers if any(map(is_given, inputs[layer]))]
    others = [layer for layer in layers if layer not in given and any(map(_may_be_words, inputs[layer]))]
    return given if not given else [*given, *others]


def _may_be_words(ids: Tensor) -> bool:
    """Whether ids are other than those of positions or segments, which never grow by more than one."""
    return ids.dim() > 1 and bool((ids.diff(dim=-1) > 1).any())


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Embedding, nn.EmbeddingBag))


def layers_sharing_table(module: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The layer, and the module's other embedding layers that share its weight (as encoder and decoder may)."""
    weight = getattr(layer, "weight", None)
    inside = set(layer.modules())  # a layer of peft contains the layer that it wraps
    tied = [other for other in module.modules() if _is_embedding(other) and other.weight is weight]
    return [layer, *(other for other in tied if other not in inside)]


@dataclass(frozen=True)
class SiteLayers:
    """A site with its layers in a module.

    Attributes:
        site: the site.
        layers: its layer; for the word embedding table, all layers that share the table.
    """

    site: Site
    layers: tuple[nn.Module, ...]


def sites_on_module(module: nn.Module, sites: Sequence[Site]) -> list[SiteLayers]:
    """Sites with their layers in a module.

    Raises:
        ValueError: if the module has no layer of a site's name.
    """
    with_layers = []
    for site in sites:
        layer = named_layer(module, site.layer)
        layers = tuple(layers_sharing_table(module, layer)) if site.has_words else (layer,)
        with_layers.append(SiteLayers(site, layers))
    return with_layers


def linear_layers_named(module: nn.Module, pattern: str) -> list[str]:
    """The dotted names of the linear and convolution layers that match a name, or a pattern with ``*``.

    Raises:
        ValueError: if none matches; the message lists the nearest names.
    """
    linear = [unwrapped_name(name) for name, layer in module.named_modules() if is_linear(layer)]
    matching = list(dict.fromkeys(name for name in linear if fnmatchcase(name, pattern)))
    if matching:
        return matching
    inside = [name for name in linear if name.startswith(f"{pattern}.")]  # a layer of peft contains several
    near = inside or get_close_matches(pattern, linear, n=3, cutoff=0) or ["none"]
    raise ValueError(
        f"methods names {pattern!r}, but {type(module).__name__} has no {LINEAR_LAYERS} of that name. "
        f"{'Inside of it are' if inside else 'The nearest are'}: {', '.join(near[:5])}."
    )


def called_layers(losses: Callable[[], Tensor], layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Those of some layers that are called, where gradients can be taken, when the losses are computed."""
    called: set[nn.Module] = set()

    def record(layer: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled():  # else, as in a teacher, no loss reaches the layer
            called.add(layer)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(record).remove)
        losses()
    return called


def find_last_layer(module: nn.Module) -> nn.Linear:
    """The last linear layer: a Hugging Face model's output embedding, or else the ``nn.Linear`` registered last.

    Raises:
        ValueError: if the module has no ``nn.Linear``.
    """
    for submodule in module.modules():
        outputs = _layer_from_getter(submodule, "get_output_embeddings")
        if isinstance(outputs, nn.Module) and isinstance(unwrapped(outputs), nn.Linear):
            return unwrapped(outputs)  # type: ignore[return-value]
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(module).__name__} has no nn.Linear, which TracIn-Last needs. {LAST_ADVICE}.")
    return linears[-1]


def find_layers_before_loss(module: nn.Module, losses: Callable[[], Tensor]) -> tuple[list[nn.Linear], bool]:
    """The linear layers whose output reaches the losses through no other linear layer.

    One forward pass records the layers' outputs, and a walk through the autograd graph, back from the losses, stops at
    the first of them on each path. So the result does not depend on the order in which layers are registered.

    Args:
        module: the module.
        losses: computes the losses of a batch, with autograd on.

    Returns:
        The layers, and whether one of them also reaches the losses through another, as in an encoder that adds a part's
        input to its output.

    Raises:
        ValueError: if the walk meets ``torch.utils.checkpoint`` with ``use_reentrant=True``, which hides its layers.
    """
    layer_of: dict[Any, nn.Linear] = {}

    def record(layer: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
        layer_of[output.grad_fn] = layer  # type: ignore[assignment]
        return output

    handles = [layer.register_forward_hook(record) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        total = losses().sum()
    finally:
        for handle in handles:
            handle.remove()
    name = type(module).__name__
    nearest = _first_met([total.grad_fn], layer_of, name)
    behind: set[Any] = set()
    ends = nearest
    while ends:  # the layers behind those, and so on
        ends = [each for each in _first_met(_earlier(ends), layer_of, name) if each not in behind]
        behind.update(ends)
    layers = list(dict.fromkeys(layer_of[node] for node in nearest))
    return layers, not behind.isdisjoint(nearest)


def _first_met(nodes: Sequence[Any], stops: Mapping[Any, nn.Linear], name: str) -> list[Any]:
    """The nodes among ``stops`` that a walk back through the autograd graph meets first on each path."""
    met: dict[Any, None] = {}
    visited: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                f"{name} computes a part in torch.utils.checkpoint with use_reentrant=True, where gradients of "
                "examples cannot be taken. Use use_reentrant=False."
            )
        visited.add(node)
        if node in stops:
            met[node] = None
        else:
            waiting.extend(_earlier([node]))
    return list(met)


def _earlier(nodes: Sequence[Any]) -> list[Any]:
    """The nodes before some in the autograd graph."""
    return [earlier for node in nodes for earlier, _ in node.next_functions]


def only_layer_before_loss(module: nn.Module, losses: Callable[[], Tensor]) -> nn.Linear:
    """The only linear layer that feeds the losses directly.

    Args:
        module: the module.
        losses: computes the losses of a batch, with autograd on.

    Raises:
        NoLastLayer: if there is none, or if several do that follow each other, as in an encoder without a head.
        ValueError: if several do side by side; in each case the message lists them by name.
    """
    layers, in_a_row = find_layers_before_loss(module, losses)
    if len(layers) == 1:
        return layers[0]
    if not layers:
        raise NoLastLayer(
            f"No nn.Linear of {type(module).__name__} feeds the losses, or influence_loss detaches them. {LAST_ADVICE}."
        )
    raise (NoLastLayer if in_a_row else ValueError)(
        f"{len(layers)} linear layers of {type(module).__name__} feed the loss directly: "
        f"{_listed(module, list(layers))}. {LAST_ADVICE}."
    )


def layer_name(module: nn.Module, layer: nn.Module) -> str:
    """The layer's dotted name inside the module.

    Raises:
        ValueError: if the layer is not part of the module.
    """
    name: str
    for name, submodule in module.named_modules():
        if submodule is layer:
            return unwrapped_name(name)
    raise ValueError(f"The layer {layer} is not a part of {type(module).__name__}; return one that is.")


def named_layer(module: nn.Module, name: str) -> nn.Module:
    """The layer of a dotted name that :func:`layer_name` gave, through any wrappers of FSDP and checkpointing.

    Raises:
        ValueError: if the module has no layer of that name.
    """
    layer = module
    try:
        for component in name.split("."):
            layer = unwrapped(layer).get_submodule(component)
    except AttributeError as error:
        raise ValueError(f"{type(module).__name__} has no layer {name!r}, at which gradients were taken.") from error
    return unwrapped(layer)


def _hugging_face_embeddings(module: nn.Module) -> tuple[list[nn.Module], set[int]]:
    """The embedding layers that ``get_input_embeddings`` of the outermost Hugging Face models returns.

    With them the ids of all modules inside of those models.
    """
    layers: list[nn.Module] = []
    inside: set[int] = set()
    for submodule in module.modules():
        if id(submodule) in inside:
            continue
        layer = _layer_from_getter(submodule, "get_input_embeddings")
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Module) and isinstance(weight, Tensor) and weight.dim() <= 2:  # 1: a part, under FSDP
            layers.append(unwrapped(layer))
            inside.update(id(child) for child in submodule.modules())
    return layers, inside


def _layer_from_getter(model: nn.Module, method: str) -> Any:
    """The layer that a Hugging Face model's getter returns; None if the model has no such getter or layer."""
    getter = getattr(model, method, None)
    if not callable(getter):
        return None
    try:
        return getter()
    except (NotImplementedError, AttributeError):  # transformers raises these for a model without such a layer
        return None


def _listed(module: nn.Module, layers: list[nn.Module]) -> str:
    """The layers' names and the shapes of their weights, for an error message."""
    return ", ".join(
        f"{layer_name(module, layer)} ({tuple(weight.shape)})"
        if isinstance(weight := getattr(layer, "weight", None), torch.Tensor)
        else layer_name(module, layer)
        for layer in layers
    )
