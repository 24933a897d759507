"""What the metrics check of the tensors that they are given."""

from __future__ import annotations

from torch import Tensor


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
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(
            f"Argument `{name}` expected to be a mask of 0 and 1, but got the value {int(values.max())}: "
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
        raise ValueError(f"Argument `{name}` expected to be of the {expected} {of}, but got {found}.")


def check_count(name: str, count: int, most: int | None = None) -> None:
    """Refuses a number of examples that is not 1 or more, or above what there is.

    Raises:
        ValueError: it is.
    """
    is_whole = isinstance(count, int) and not isinstance(count, bool)
    if not is_whole or count < 1 or (most is not None and count > most):
        bound = "1 or more" if most is None else f"from 1 to {most}"
        raise ValueError(f"Argument `{name}` expected to be a whole number, {bound}, but got {count}.")


def _check_shape(name: str, values: Tensor, shape: str, dims: tuple[int, ...]) -> None:
    if values.ndim not in dims or values.numel() == 0:
        raise ValueError(f"Argument `{name}` expected to be of shape {shape}, but got {tuple(values.shape)}.")
