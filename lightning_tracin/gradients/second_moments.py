"""Adam's second moments of a layer's weight, by which products of gradients may be divided."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SecondMoments:
    """Adam's bias-corrected second moments of a layer's weight.

    Attributes:
        values: (rows, columns) of the weight; for a linear layer with a bias, its bias is the last column.
        rows: (rows,) sorted token ids, where only the rows of words that were trained on are kept; else None.
        eps: Adam's epsilon.
    """

    values: Tensor
    rows: Tensor | None
    eps: float

    def of_tokens(self, tokens: Tensor) -> SecondMoments:
        """Those of some tokens' rows, (len(tokens), columns); 0 for a token that was not trained on."""
        if self.rows is None:
            return replace(self, values=self.values[tokens])
        found = torch.searchsorted(self.rows, tokens).clamp(max=len(self.rows) - 1)
        known = self.rows[found] == tokens
        return SecondMoments(self.values[found] * known[:, None], None, self.eps)

    def weights(self) -> Tensor:
        """What a product of two gradients is multiplied with: 1 / (root + eps); 0 where Adam has not stepped yet."""
        return torch.where(self.values > 0, 1 / (self.values.sqrt() + self.eps), 0.0)
