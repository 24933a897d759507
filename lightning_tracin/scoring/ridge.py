"""TracInRidge: what training examples say of a test example together, instead of each by itself.

The method as an object to ask by; what it computes stands in ``kernels.py`` and ``ridge_scores.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lightning_tracin.checked_numbers import real_number, whole_number_or_none


class _Summed(Protocol):
    """A method whose scores are a sum over sites."""

    @property
    def summands(self) -> Sequence[Any]:
        """A method at one site each, with a factor."""


@dataclass(frozen=True)
class TracInRidge:
    """Kernel ridge regression in its dual form, on the cosine kernels of another method.

    A score of TracIn compares a training example with the test example and with nothing else: a hundred near copies of
    one example count a hundred times. Here they share what they have to say. At a checkpoint, with U the cosines of the
    method between examples (of several parts the mean, weighted by their mix), n the number of training examples, and
    a = alpha n:

    T = a (U[train, train] + a I)⁻¹ U[train, test]

    score(z_i, z') = Σ_c w_c residual_i(c) ** residual T_i(c),

    where w_c is how much a checkpoint counts for the method, and residual_i(c) is 1 minus the probability of example
    i's label, the length of its loss gradient at the model's output: the weight of an example in the dual of a
    logistic regression. As alpha grows, T becomes U, and the scores those of the method.

    The kernels take memory that grows with the square of the number of training examples, 8 bytes for each pair, which
    is said before it is taken; by landmarks, n times their number. A score is no sum over the words of a pair, so there
    are no word terms.

    Args:
        method: whose cosines are meant: a TracInWE, TracInLast or TracInLayer with ``normalize="cosine"``, or a
            TracInSum of such, whose mix is scaled so that it adds up to 1.
        alpha: how much is smoothed, in parts of the number of training examples; above 0.
        residual: the power of the residuals, which are read from the gradients at the last layer; 0 leaves them out,
            and needs no last layer.
        landmarks: approximate the kernel by its columns at so many training examples, drawn at random (Nyström's
            method; Williams and Seeger 2001), at least 1; None for all of it.

    Raises:
        ValueError: if an argument is not of this form.

    Example:
        >>> from lightning_tracin import TracInWE
        >>> TracInRidge(TracInWE(normalize="cosine"), residual=0).alpha
        0.0625
    """

    method: _Summed
    alpha: float = 1 / 16
    residual: float = 0.5
    landmarks: int | None = None

    def __post_init__(self) -> None:
        wanted = "a TracInWE, TracInLast, TracInLayer or TracInSum"
        if isinstance(self.method, (type, TracInRidge)) or not hasattr(self.method, "summands"):
            raise ValueError(f"method must be {wanted}, but got {self.method!r}.")
        if any(summand.method.normalize != "cosine" for summand in self.method.summands):
            raise ValueError(
                'TracInRidge compares examples by cosines: method must have normalize="cosine" in all of its parts, '
                f"but got {self.method!r}."
            )
        if getattr(self.method, "scales", None) is not None:
            raise ValueError(f"TracInRidge mixes cosines, which need no scales, but got {self.method!r}.")
        if min(self._mix) < 0 or sum(self._mix) <= 0:
            raise ValueError(f"mix must have no number under 0, and one above, for TracInRidge, but got {self._mix}.")
        object.__setattr__(self, "alpha", real_number("alpha", self.alpha, above=0))
        object.__setattr__(self, "residual", real_number("residual", self.residual, at_least=0))
        object.__setattr__(self, "landmarks", whole_number_or_none("landmarks", self.landmarks))

    @property
    def summands(self) -> tuple[Any, ...]:
        """The parts of the method, with factors that add up to 1."""
        total = sum(self._mix)
        pairs = zip(self.method.summands, self._mix, strict=True)
        return tuple(replace(summand, factor=mixed / total) for summand, mixed in pairs)

    @property
    def _mix(self) -> Sequence[float]:
        """How much each part counts."""
        mix: Sequence[float] | None = getattr(self.method, "mix", None)
        return (1.0,) * len(self.method.summands) if mix is None else mix
