"""Embedding layers of a kind of their own, whose output may be another than the rows of their table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_tracin.gradients.linear_layers import is_ours


def lookup_factor(layer: nn.Module, ids: Tensor, output: Tensor) -> float:
    """What an embedding layer of a kind of its own, or with a forward hook, multiplies the rows of its table by.

    The gradient of a row is that at the output where the row comes out as it is, as it does of most layers; times a
    constant, as in models that scale their embeddings, it is that times the constant.

    Raises:
        ValueError: if its output is another, so that the gradient there is not that of its rows.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Embedding) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return 1.0
    if weight.dim() != 2 or ids.is_floating_point():  # sharded, or not by ids
        return 1.0
    if type(layer).forward is nn.Embedding.forward and all(map(is_ours, layer._forward_hooks.values())):
        return 1.0
    with torch.no_grad():
        rows = functional.embedding(ids, weight).float()
        found = output.detach().float()
        if rows.shape == found.shape:
            square = float(rows.square().sum())
            factor = float((rows * found).sum()) / square if square else 1.0
            error = float((found - factor * rows).norm())
            if not error > 0.02 * abs(factor) * square**0.5:  # of what is not finite others tell
                # Rows that are rounded, as in training for few bits, are multiplied by nothing.
                return factor if math.isfinite(factor) and abs(factor - 1) > 0.01 else 1.0
    raise ValueError(
        f"{type(layer).__name__} is an nn.Embedding by its class, but its own forward, or a forward hook, returns "
        "other numbers than the rows of its weight: the gradient of a word is not that at its output. Do what it does "
        "beside the rows in a layer after it, or return from influence_embedding_layer one that returns its rows."
    )
