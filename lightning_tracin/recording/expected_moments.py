"""How much space Adam's second moments of a layer will take, before Adam has any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.layers import named_layer
from lightning_tracin.gradients.rows import unique_tokens
from lightning_tracin.gradients.sites import Gradients, Site
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.parallel.fsdp import parameter_names
from lightning_tracin.storage.sizes import distinct_words, moments_size, zipf_exponent


def moments_bytes(
    optimizers: Sequence[torch.optim.Optimizer],
    module: nn.Module,
    state: Mapping[str, Any],
    site: Site,
    sample: Gradients,
    *,
    n_drawn: float,
) -> float:
    """Bytes of Adam's second moments of a site's weight; at the word table, of the rows that training has reached.

    Args:
        optimizers: of the fit.
        module: that is trained.
        state: its state dict, with full weights; without the weight, as in other processes than the first, it is 0.
        site: which names the layer.
        sample: the gradients of a few examples there.
        n_drawn: how many rows of gradients training will have drawn.
    """
    layer, names = named_layer(module, site.layer), parameter_names(module)
    parameters = [each for kind in ("weight", "bias") if isinstance(each := getattr(layer, kind, None), Tensor)]
    full = [state[name] for each in parameters for name in names.get(id(each), [])[:1] if name in state]
    trained_by = [_of_adam(optimizers, each) for each in parameters]
    if not full or None in trained_by:
        return 0.0
    n_rows = len(full[0])
    width = sum(each.numel() for each in full) / n_rows
    if not isinstance(sample, WordGradients):
        return moments_size(n_rows, width)
    optimizer, group = trained_by[0] or (None, {})
    is_tied = len(names[id(parameters[0])]) > 1  # a head has gradients of every row
    if not is_tied and not _decays_by_gradient(optimizer, group) and len(sample.tokens):
        exponent = zipf_exponent(n_rows, len(sample.tokens), len(unique_tokens(sample.tokens)))
        return moments_size(distinct_words(n_rows, n_drawn, exponent), width, numbered=True)
    return moments_size(n_rows, width, numbered=True)


def _of_adam(
    optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor
) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
    """The optimizer of the Adam family that trains a parameter, and the group that holds it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(each is parameter for each in group["params"]) and parameter.requires_grad:
                has_moments = "betas" in group and isinstance(group.get("eps"), (int, float))
                return (optimizer, group) if has_moments and not isinstance(optimizer, torch.optim.Adamax) else None
    return None


def _decays_by_gradient(optimizer: torch.optim.Optimizer | None, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is part of the gradient, so that Adam has second moments of every row."""
    is_decoupled = group.get("decoupled_weight_decay", False) or isinstance(optimizer, torch.optim.AdamW)
    return bool(group.get("weight_decay")) and not is_decoupled
