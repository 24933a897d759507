"""The positions of all calls of a layer in a forward pass, joined and sorted by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tracin.gradients.attention_masks import attended_ids
from lightning_tracin.gradients.calls import Call
from lightning_tracin.gradients.linear_layers import factors_of_call


def word_positions(calls: Sequence[Call], owners_of_calls: list[Tensor], batch: Any) -> tuple[Tensor, ...]:
    """The positions, without padding, of all calls of the layers that read the word embedding table.

    Args:
        calls: the calls, with their gradients.
        owners_of_calls: for each call, the example of each position.
        batch: the batch; attention masks in it mark padding, as does the layer's ``padding_idx``.

    Returns:
        The example (P,), token id (P,) and gradient of the row (P, H) of each position, the call (P,) that it is in,
        and its place (P,) among the ids of that call, on the CPU.

    Raises:
        ValueError: if a call maps token ids (B, T) neither to vectors (B, T, H) nor, as nn.EmbeddingBag, to (B, H).
    """
    call_positions: list[tuple[Tensor, ...]] = []
    for number, (call, owners) in enumerate(zip(calls, owners_of_calls, strict=True)):
        ids, output, owners = call.inputs, call.output, owners.reshape(-1)
        padding = getattr(
            getattr(call.layer, "base_layer", call.layer), "padding_idx", None
        )  # peft keeps the wrapped layer there
        if ids.is_floating_point() or (call.bags is None and output.shape[:-1] != ids.shape):
            raise ValueError(
                f"The embedding layer must turn ids of shape (B, T) into vectors of shape (B, T, H), but turned "
                f"{ids.dtype} {tuple(ids.shape)} into {tuple(output.shape)}. Return the word embedding layer from "
                "influence_embedding_layer."
            )
        is_token = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
        attended = attended_ids(batch, ids)
        if attended is not None:
            is_token &= attended
        places = torch.nonzero(is_token.cpu().reshape(-1))[:, 0]
        gradient = call.gradient_by_position.float().cpu().reshape(-1, output.shape[-1])
        if call.factor != 1:
            gradient = gradient * call.factor
        if call.bags is not None:
            bags = call.bags.of_words.cpu()[places]
            owners, gradient = owners[bags], gradient[bags] * call.bags.shares.cpu()[places, None]
        elif len(places) < len(gradient):  # without padding, indexing would copy all rows for nothing
            owners, gradient = owners[places], gradient[places]
        tokens = ids.cpu().reshape(-1)[places].long()
        call_positions.append((owners, tokens, gradient, torch.full_like(places, number), places))
    return _by_example(call_positions)


def linear_positions(calls: Sequence[Call], owners_of_calls: list[Tensor]) -> tuple[Tensor, ...]:
    """The positions of all calls of a linear layer.

    Args:
        calls: the calls, with their gradients.
        owners_of_calls: for each call, the example of each position.

    Returns:
        The example (P,), the input (P, in), with a 1 appended if the layer has a bias, and the gradient at the output
        (P, out) of each position, on the CPU.
    """
    call_positions: list[tuple[Tensor, ...]] = []
    for call, owners in zip(calls, owners_of_calls, strict=True):
        delta = call.gradient_by_position.float().cpu()
        call_positions.append(factors_of_call(call.layer, call.inputs.float().cpu(), delta, owners))
    return _by_example(call_positions)


def _by_example(call_positions: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The positions of all calls sorted by example; inside of an example, in the order of the calls and positions.

    Args:
        call_positions: for each call several columns, of which the first says the example.
    """
    if len(call_positions) == 1 and bool((call_positions[0][0].diff() >= 0).all()):
        return call_positions[0]
    columns = [torch.cat(pieces) for pieces in zip(*call_positions, strict=True)]
    order = torch.argsort(columns[0], stable=True)
    return tuple(column[order] for column in columns)
