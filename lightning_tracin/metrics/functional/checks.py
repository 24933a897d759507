"""What the metrics check of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_tracin.checked_numbers import whole_numbers


def check_finite(name: str, values: Tensor, shape: str, dims: tuple[int, ...]) -> None:
    """Refuses what is no tensor of finite floating-point numbers with the dimensions asked for.

    Args:
        name: the argument's, for the message.
        values: what was given.
        shape: the shape that is expected, in words: ``"(n_test, n_train)"``.
        dims: how many dimensions it may have.

    Raises:
        TypeError: what was given is no tensor of floating-point numbers.
        ValueError: it has other dimensions, is empty, or holds NaN or infinity.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"Argument `{name}` expected to be a tensor of floating-point numbers, but got {found}.")
    _check_shape(name, values, shape, dims)
    if not values.isfinite().all():
        wrong = int((~values.isfinite()).sum())
        raise ValueError(f"Argument `{name}` expected to be finite, but got {wrong} values of NaN or infinity.")


def check_mask(name: str, values: Tensor, shape: str, dims: tuple[int, ...]) -> None:
    """Refuses what is no tensor of bool with the dimensions asked for.

    Raises:
        TypeError: what was given is no tensor of bool.
        ValueError: it has other dimensions, or is empty.
    """
    if not isinstance(values, Tensor) or values.dtype.is_floating_point or values.dtype.is_complex:
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"Argument `{name}` expected to be a tensor of bool, but got {found}.")
    _check_shape(name, values, shape, dims)
    others = values[(values != 0) & (values != 1)]
    if len(others):
        raise ValueError(
            f"Argument `{name}` expected to be a mask of 0 and 1, but got the value {int(others[0])}: "
            "of indices make a mask first."
        )


def check_whole(name: str, values: Tensor, shape: str, dims: tuple[int, ...]) -> None:
    """Refuses what is no tensor of whole numbers, such as labels or indices, with the dimensions asked for.

    Raises:
        TypeError: what was given is no tensor of integers.
        ValueError: it has other dimensions, or is empty.
    """
    if not isinstance(values, Tensor) or values.is_floating_point() or values.is_complex():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"Argument `{name}` expected to be a tensor of integers, but got {found}.")
    _check_shape(name, values, shape, dims)


def check_length(name: str, found: int, expected: int, of: str) -> None:
    """Refuses a dimension that does not go with another argument's.

    Args:
        name: the argument's, for the message.
        found: the size of its dimension.
        expected: what that should be.
        of: what is counted, and where that was told: ``"training examples of `scores`"``.

    Raises:
        ValueError: they differ.
    """
    if found != expected:
        raise ValueError(f"Argument `{name}` expected to have the {expected} {of}, but got {found}.")


def growing_ks(ks: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """Numbers of removed examples.

    Raises:
        ValueError: there are none, one is no whole number of at least ``least``, or they do not grow.
    """
    numbers = whole_numbers("ks", ks, least)
    if not numbers or any(later <= k for k, later in pairwise(numbers)):
        raise ValueError(f"Argument `ks` expected to be growing numbers of removed examples, but got {list(numbers)}.")
    return numbers


def warn_of_constant(name: str, is_constant: Tensor, over: str, then: str) -> None:
    """Warns where something does not vary, so that it ranks nothing.

    Args:
        name: the argument's.
        is_constant: (n_test,) bool, whether a test example's values are all the same.
        over: what they should vary over: ``"training examples"``.
        then: what such test examples count.
    """
    if constant := int(is_constant.sum()):
        rank_zero_warn(
            f"Argument `{name}` expected to vary over the {over}, but got {constant} of {len(is_constant)} test "
            f"examples with the same value for all: {then}.",
            UserWarning,
        )


def _check_shape(name: str, values: Tensor, shape: str, dims: tuple[int, ...]) -> None:
    if values.ndim not in dims or values.numel() == 0:
        raise ValueError(f"Argument `{name}` expected to be of shape {shape}, but got {tuple(values.shape)}.")
