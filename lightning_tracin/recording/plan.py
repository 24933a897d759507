"""What a fit is asked to record."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_tracin.checked_numbers import is_whole, pair_of_whole_numbers, whole_number
from lightning_tracin.gradients.rows import DTYPES
from lightning_tracin.recording.log_plan import LogPlan
from lightning_tracin.scoring.methods import TracInLast, TracInLayer, TracInWE
from lightning_tracin.storage.encoding import StorageOptions

Cache: TypeAlias = Literal["checkpoint", "training", "on_demand"]
OnError: TypeAlias = Literal["warn", "raise"]

#: What stands for a site whose layer the module names itself; any other method is the name of a layer.
WORDS, LAST = "tracin-we", "tracin-last"


@dataclass(frozen=True)
class RecordingPlan:
    """The arguments of :class:`~lightning_tracin.TracInCallback`, checked; it says what each means.

    Raises:
        ValueError: on a wrong one.
    """

    dirpath: Path | None
    every_n_epochs: int
    every_n_train_steps: int | None
    cache: Cache
    methods: tuple[str, ...]
    options: StorageOptions
    log_examples: int | tuple[int, ...]
    log_k: int
    log: LogPlan
    on_error: OnError
    overwrite: bool
    keep_weights: bool = True

    def __post_init__(self) -> None:
        if self.cache not in ("checkpoint", "training", "on_demand"):
            raise ValueError(f"cache must be 'checkpoint', 'training' or 'on_demand', but got {self.cache!r}.")
        if self.options.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, but got {self.options.dtype!r}.")
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', but got {self.on_error!r}.")
        self._check_rank()
        self._check_log()
        if not self.keep_weights:
            self._check_without_weights()

    def _check_rank(self) -> None:
        """Check that K-FAC's components can be stored as they are asked for."""
        if self.options.rank is None:
            return
        if isinstance(self.options.projection, tuple):
            raise ValueError(
                f"rank={self.options.rank} and projection={self.options.projection} both make gradients of linear "
                "layers smaller. Use one of them."
            )
        if self.cache == "training":
            raise ValueError(
                "rank takes second moments over training examples at each checkpoint's weights before gradients are "
                'stored, but cache="training" takes gradients as training goes on. Use cache="checkpoint" or '
                'cache="on_demand".'
            )

    def _check_log(self) -> None:
        """Check that validations can be logged as they are asked for."""
        if not self.log_examples and not self.log.is_default:
            raise ValueError("log_method and log_texts go with log_examples, the validation examples to log.")
        if self.log_examples and self.cache == "on_demand":
            raise ValueError(
                'log_examples needs gradients that are stored while the fit runs, but cache="on_demand" stores none. '
                'Use cache="checkpoint" or cache="training".'
            )

    def _check_without_weights(self) -> None:
        """Check that nothing needs the weights later."""
        if self.cache == "on_demand":
            raise ValueError(
                'keep_weights=False leaves gradients without weights, but cache="on_demand" stores no gradients while '
                'the fit runs. Use cache="checkpoint" or cache="training", or keep_weights=True.'
            )
        if self.log_examples:
            raise ValueError(
                "log_examples scores validation examples at the weights of every checkpoint so far, but "
                "keep_weights=False drops these. Use log_examples=0, or keep_weights=True."
            )


def methods_to_record(value: Sequence[str]) -> tuple[str, ...]:
    """``methods`` as names.

    Raises:
        ValueError: if they are none.
    """
    names = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    meant = next((f"{name!r} for {each!r}" for each in names if (name := _name_meant(each)) is not None), None)
    if (
        meant is not None
        or not value
        or names is not value
        or not all(isinstance(each, str) and each for each in value)
    ):
        advice = f". Write {meant}." if meant else "."
        if isinstance(value, str) and value:
            advice = f", a string. Write methods=({value!r},): with the comma it is a tuple of one name."
        raise ValueError(
            'methods must be some of ("tracin-we", "tracin-last"), and names of linear or convolution layers, but got '
            f"{value!r}{advice}"
        )
    return tuple(dict.fromkeys(value))


def _name_meant(method: Any) -> str | None:
    """The name that is meant by a method, by its class, or by another spelling; None for anything else."""
    kind = method if isinstance(method, type) else type(method)
    if kind in (TracInWE, TracInLast):
        return WORDS if kind is TracInWE else LAST
    if isinstance(method, TracInLayer):
        return method.name
    if not isinstance(method, str) or method in (WORDS, LAST):
        return None
    spelt = {"tracinwe": WORDS, "tracinlast": LAST}
    letters = re.sub("[^a-z]", "", method.lower())
    near = get_close_matches(letters, spelt, n=1, cutoff=0.9) if letters.startswith("tracin") else []
    return spelt[near[0]] if near else None


def projection_sizes(value: Any) -> int | tuple[int, int] | None:
    """``projection`` as a number for words, or as a pair for linear layers.

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return pair_of_whole_numbers("projection", value, "of the gradient at the output and of the input")
    of_both = "a pair of whole numbers for linear layers, or one for word gradients,"
    return whole_number("projection", value, allowed=of_both)


def component_numbers(value: Any) -> tuple[int, int] | None:
    """``rank`` as a pair.

    Raises:
        ValueError: if it is none.
    """
    of = "of components of the inputs and of the output gradients of linear layers, such as (128, 32)"
    return None if value is None else pair_of_whole_numbers("rank", value, of)


def examples_to_log(value: Any) -> int | tuple[int, ...]:
    """``log_examples`` as a number, or as indices.

    Raises:
        ValueError: if it is neither.
    """
    indices = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    for each in [value] if indices is None else indices:
        if not is_whole(each) or each < 0:
            raise ValueError(
                f"log_examples must be a number of validation examples or a list of their indices, but got {value!r}."
            )
    if indices is None:
        return int(value)
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"log_examples must name each validation example once, but got {value!r}.")
    return tuple(int(each) for each in indices)


def local_path(value: str | Path, what: str) -> Path:
    """A path, if it is one of a file system.

    Raises:
        TypeError: if it is no path.
        ValueError: if it is a URL, as Lightning's own paths may be.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"The {what} must be the path of one folder, but got a {type(value).__name__}: {value!r}.")
    if "://" in str(value):
        raise ValueError(
            f"A trace is a folder of a file system, but the {what} is {str(value)!r}. Pass a local folder as dirpath "
            "of TracInCallback, and copy it when the fit is over."
        )
    return Path(value).expanduser()
