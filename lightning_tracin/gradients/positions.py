"""The positions that layers were called on, over all calls in a forward pass, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.calls import Call
from lightning_tracin.gradients.linear_layers import factors_of_call

_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def word_positions(calls: Sequence[Call], owners_of_calls: list[Tensor], batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Example, token id and gradient of every position that is not padding, over all calls of the embedding layer."""
    parts = []
    for call, owners in zip(calls, owners_of_calls, strict=True):
        ids, output = call.inputs, call.output
        padding = getattr(getattr(call.layer, "base_layer", call.layer), "padding_idx", None)  # peft wraps the layer
        if ids.is_floating_point() or output.shape[:-1] != ids.shape:
            raise ValueError(
                f"The embedding layer must turn ids of shape (B, T) into vectors of shape (B, T, H), but turned "
                f"{ids.dtype} {tuple(ids.shape)} into {tuple(output.shape)}. Return the word embedding layer from "
                "influence_embedding_layer (an EmbeddingBag has no gradient for each word)."
            )
        keep = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
        mask = _attention_mask(batch, ids)
        if mask is not None:
            keep &= mask != 0
        kept = torch.nonzero(keep.cpu().reshape(-1))[:, 0]
        gradient = call.gradient_by_position.float().cpu().reshape(-1, output.shape[-1])
        if len(kept) < len(gradient):  # a copy of all rows is dear
            gradient = gradient[kept]
        parts.append((owners.reshape(-1)[kept], ids.cpu().reshape(-1)[kept].long(), gradient))
    return _by_example(parts)


def linear_positions(calls: Sequence[Call], owners_of_calls: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Example, input (a 1 appended where there is a bias) and delta of every position, over all calls of the layer."""
    parts = []
    for call, owners in zip(calls, owners_of_calls, strict=True):
        delta = call.gradient_by_position.float().cpu()
        parts.append(factors_of_call(call.layer, call.inputs.float().cpu(), delta, owners))
    return _by_example(parts)


def _by_example(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of all calls, example by example, each in the order of its calls and positions."""
    if len(parts) == 1 and bool((parts[0][0].diff() >= 0).all()):
        return parts[0]
    owners, first, second = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = torch.argsort(owners, stable=True)
    return owners[order], first[order], second[order]


def _attention_mask(batch: Any, ids: Tensor) -> Tensor | None:
    """The attention mask that belongs to the ids that the embedding layer was called with."""
    if not isinstance(batch, Mapping):
        return None
    for ids_name, mask_name in _MASKS.items():
        named, mask = batch.get(ids_name), batch.get(mask_name)
        if not isinstance(named, Tensor) or not isinstance(mask, Tensor):
            continue
        if mask.shape == ids.shape == named.shape and torch.equal(named, ids):
            return mask
    return None
