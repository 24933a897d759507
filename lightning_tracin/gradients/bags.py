"""nn.EmbeddingBag: the words that each bag adds up, and how much each counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Bags:
    """The words of a call of ``nn.EmbeddingBag``.

    The gradient of a word's row is that of its bag, times the word's share of it.

    Attributes:
        of_words: (P,) int64, the bag of each word.
        shares: (P,) the factor of each word's row in its bag; 0 for padding.
    """

    of_words: Tensor
    shares: Tensor

    @classmethod
    def of(cls, layer: nn.EmbeddingBag, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bags:
        """The words of a call, in the order of its flattened ids.

        Args:
            layer: the layer.
            args: the positional arguments of the call: ids (B, T), or (P,) with the offsets of B bags.
            kwargs: its keyword arguments.

        Raises:
            ValueError: if the layer takes the maximum, which belongs to other words in each feature.
        """
        if layer.mode == "max":
            raise ValueError(
                f'{layer} takes the maximum of its words, which has no gradient for each word. Use mode="sum" or '
                '"mean", or nn.Embedding followed by max(1).'
            )
        given = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | dict(kwargs)
        ids, offsets, weights = (given.get(name) for name in ("input", "offsets", "per_sample_weights"))
        assert isinstance(ids, Tensor)
        if ids.dim() == 2:
            of_words = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        else:
            assert isinstance(offsets, Tensor)
            starts = offsets[:-1] if layer.include_last_offset else offsets
            of_words = torch.bucketize(torch.arange(len(ids), device=ids.device), starts, right=True) - 1
        ids = ids.reshape(-1)
        counted = torch.ones_like(ids) if layer.padding_idx is None else (ids != layer.padding_idx).to(ids.dtype)
        shares = counted.float()
        if isinstance(weights, Tensor):
            shares = shares * weights.detach().reshape(-1).float()
        if layer.mode == "mean":
            sizes = torch.zeros(int(of_words.max()) + 1 if len(ids) else 0, device=ids.device)
            shares = shares / sizes.index_add(0, of_words, shares).clamp(min=1)[of_words]
        return cls(of_words, shares)
