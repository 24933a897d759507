"""Which tokens of a batch are padding, by its attention masks, wherever in it they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def attended_ids(batch: Any, ids: Tensor) -> Tensor | None:
    """Where the token ids of a layer's call are no padding, by the batch's attention mask for them; None without one.

    The ids may be those of several entries of the batch, one after the other, and have fewer dimensions there.

    Args:
        batch: a mapping, or mappings in tuples, lists, dataclasses and mappings.
        ids: (..., T) of the call.

    Returns:
        (..., T) bool.
    """
    if ids.dim() < 2:
        return None
    masked = [
        (each.flatten(0, -2), attended.flatten(0, -2))
        for entries in _named_entries(batch)
        for name, each in entries.items()
        if "input_ids" in str(name)
        and isinstance(each, Tensor)
        and each.dim() > 1
        and (attended := _attended(entries, str(name).replace("input_ids", "attention_mask"), each.shape)) is not None
    ]
    if len({each.shape[-1] for each, _ in masked}) == 1:
        masked.append(tuple(torch.cat(each) for each in zip(*masked, strict=True)))  # type: ignore[arg-type]
    flat = ids.flatten(0, -2)
    return next((attended.view(ids.shape) for each, attended in masked if torch.equal(each, flat)), None)


def attended_tokens(batch: Any, shape: Sequence[int]) -> Tensor:
    """(B, T) tokens that are no padding, by the batch's first attention mask of that shape; all where it has none."""
    found = (_attended(entries, "attention_mask", shape) for entries in _named_entries(batch))
    return next((each.cpu() for each in found if each is not None), torch.ones(*shape, dtype=torch.bool))


def _attended(entries: Mapping[Any, Any], name: str, shape: Sequence[int]) -> Tensor | None:
    """What a mask lets through: a mask of numbers none of which is above 0 is added to scores, and 0 is let through."""
    mask = entries.get(name)
    if not isinstance(mask, Tensor) or mask.shape != torch.Size(shape):
        return None
    is_added = mask.is_floating_point() and bool((mask < 0).any()) and not bool((mask > 0).any())
    return mask == 0 if is_added else mask != 0


def _named_entries(batch: Any) -> Iterator[Mapping[Any, Any]]:
    """The mappings of a batch, and what else has named entries, as a mapping."""
    if isinstance(batch, Mapping):
        yield batch
        parts: Any = batch.values()
    elif hasattr(batch, "_asdict"):
        yield batch._asdict()
        parts = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        yield (named := {each.name: getattr(batch, each.name) for each in fields(batch)})
        parts = named.values()
    else:
        parts = batch if isinstance(batch, (tuple, list)) else ()
    for part in parts:
        if not isinstance(part, (Tensor, str)):
            yield from _named_entries(part)
