"""Spread: how far scores lie apart, from pieces of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Scores that differ by less than this part of the largest differ by rounding alone.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Spread:
    """What is known of some numbers when they have been seen.

    Attributes:
        n: how many there are.
        mean: their mean; 0 of none.
        squares: the sum of their squared differences from it.
        low: the least of them.
        high: the largest of them.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, numbers: Tensor) -> Spread:
        """The spread of a tensor's numbers, in float32 on its device, however small they are."""
        if not numbers.numel():
            return cls()
        low, high = (float(each) for each in torch.aminmax(numbers))
        largest = max(-low, high)
        if largest == 0:
            return cls(numbers.numel(), 0.0, 0.0, low, high)
        variance, mean = (float(each) for each in torch.var_mean(numbers / largest, correction=0))
        return cls(numbers.numel(), largest * mean, numbers.numel() * variance * largest**2, low, high)

    @classmethod
    def sum(cls, spreads: Iterable[Spread]) -> Spread:
        """The spread of all numbers together (Chan, Golub and LeVeque 1979).

        Example:
            >>> Spread.sum([Spread.of(torch.tensor([1.0, 2.0])), Spread.of(torch.tensor([6.0]))]).mean
            3.0
        """
        total = cls()
        for each in spreads:
            n = total.n + each.n
            if not each.n:
                continue
            apart = each.mean - total.mean
            squares = total.squares + each.squares + apart**2 * total.n * each.n / n
            low, high = min(total.low, each.low), max(total.high, each.high)
            total = cls(n, total.mean + apart * each.n / n, squares, low, high)
        return total

    @property
    def deviation(self) -> float:
        """The standard deviation (of all there are, not of a sample); 0 where they differ by rounding alone.

        Example:
            >>> Spread.of(torch.tensor([2.0, 4.0])).deviation, Spread.of(torch.tensor([2.0, 2.0])).deviation
            (1.0, 0.0)
        """
        if self.high - self.low <= _ROUNDING * max(-self.low, self.high):
            return 0.0
        return math.sqrt(self.squares / self.n)
