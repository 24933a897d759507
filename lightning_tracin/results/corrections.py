"""``apply_corrections``: a reviewed table of label issues back into a data set."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_tracin.gradients.printable import in_a_cell, printable

#: What stands in ``corrected_label`` of an example that is to be left out.
DROP = "drop"

_NEEDED = ("train_index", "given_label", "corrected_label")

_KEYS = ("labels", "label")

# As people and spreadsheets write it; Python itself takes "1_0" and "nan" for numbers, too.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)

_MOST_CHARACTERS = 2**31 - 1  # of a cell: what fits a C long everywhere

#: The rows of a reviewed table, or the CSV file that has them.
Corrections: TypeAlias = str | Path | Sequence[Mapping[str, Any]]


class CorrectedDataset(Dataset[Any]):
    """A map-style data set with other labels, and without the examples that were dropped.

    Args:
        dataset: the data set, which stays as it is.
        labels: the new label of each corrected example, by its index there.
        indices: of the examples that are left.
        label: where an item has its label.
    """

    def __init__(self, dataset: Any, labels: Mapping[int, Any], indices: Sequence[int], label: str | int) -> None:
        self.dataset = dataset
        self.labels = labels
        self.indices = indices
        self.label = label

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        index = self.indices[place]
        item = self.dataset[index]
        return _relabelled(item, self.label, self.labels[index]) if index in self.labels else item


def apply_corrections(
    dataset: Any,
    corrections: Corrections,
    *,
    label: str | int | None = None,
    names: Sequence[str] | Mapping[int, str] | None = None,
) -> Any:
    """A training set with the labels that a reviewed table of label issues corrects.

    The table is what :meth:`LabelIssues.to_csv` or the page wrote, with ``corrected_label`` filled in where a label is
    wrong: a name or a number. Left empty, the label stays; "drop" leaves the example out. Every row's ``given_label``
    is compared with the data set's, so that a table of another data set, or of another order, changes nothing.

    With names, a corrected label is one of them, or its number. Without, it is a label that the data set has, or the
    number of a new class: 0 or more, in digits. Where labels are values, any value.

    Args:
        dataset: the training data set of the fit: a list, a map-style data set, or a ``datasets.Dataset``.
        corrections: the CSV file (in UTF-8; commas, semicolons or tabs), or its rows, such as those of a pandas table
            by ``to_dict("records")``.
        label: where an item has its label: the key of a mapping, or the place in a tuple; by default ``labels`` or
            ``label``, or the second of a pair.
        names: the name of each label's number, in order or by number; by default those of a ``datasets.Dataset``.

    Returns:
        A list for a list, a ``datasets.Dataset`` for one, and else a map-style data set. The one passed is unchanged.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the data set is a stream.
        ValueError: if the table lacks a column, an index is beyond the data set or stands in it twice, a given label
            is not that of the data set, or a corrected one is not known or does not fit the type of the data set's
            labels; or if two numbers have the same name.

    Example:
        >>> rows = [{"train_index": 1, "given_label": "0", "corrected_label": "1"}]
        >>> apply_corrections([("good", 1), ("great", 0)], rows)
        [('good', 1), ('great', 1)]
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"apply_corrections needs a data set with a length and an index, but got {type(dataset).__name__}. Pass a "
            "list, a map-style data set or a datasets.Dataset, in the order of the fit."
        )
    rows = _rows_of(corrections)
    is_hugging_face = _is_hugging_face(dataset)
    where = _place_of_label(dataset, label)
    if names is None and is_hugging_face:
        names = getattr(dataset.features.get(where), "names", None)
    by_number = dict(enumerate(names)) if isinstance(names, Sequence) else dict(names or {})
    labels = _Labels(by_number, dataset.select_columns([where]) if is_hugging_face else dataset, where)
    changed: dict[int, Any] = {}
    dropped: set[int] = set()
    for row, index in zip(rows, _indices_of(rows, len(dataset)), strict=True):
        old = dataset[index][where]
        labels.check_given(_text_of(row["given_label"]), old, index)
        corrected = _text_of(row["corrected_label"])
        if corrected == DROP and not labels.has(DROP, old, index):
            dropped.add(index)
        elif corrected:
            changed[index] = labels.like(corrected, old, index)
    left = [index for index in range(len(dataset)) if index not in dropped]
    if is_hugging_face:
        corrected_rows = {"changed": changed, "where": where}
        return dataset.map(_corrected_row, with_indices=True, fn_kwargs=corrected_rows).select(left)
    found = CorrectedDataset(dataset, changed, left, where)
    return [found[place] for place in range(len(found))] if isinstance(dataset, list) else found


@dataclass(frozen=True)
class _Labels:
    """The labels of a data set, as a table has them and as the data set does.

    Attributes:
        names: of numbers.
        dataset: whose labels are known where there are no names.
        where: an item has its label.

    Raises:
        ValueError: if two numbers have the same name.
    """

    names: Mapping[int, str]
    dataset: Any
    where: str | int

    def __post_init__(self) -> None:
        name, count = Counter(self.names.values()).most_common(1)[0] if self.names else ("", 1)
        if count > 1:
            raise ValueError(
                f"names has {name!r} {count} times, so that it is no class's own. Give each number a name."
            )

    @cached_property
    def present(self) -> frozenset[str | float]:
        """The labels of the data set, which is read for them once, and only if a table does not suffice."""
        return frozenset(_plain(self.dataset[index][self.where], index) for index in range(len(self.dataset)))

    @property
    def texts(self) -> set[str]:
        """The labels that are known."""
        return set(self.names.values()) or {each if isinstance(each, str) else f"{each:.6g}" for each in self.present}

    def has(self, text: str, label: Any, index: int) -> bool:
        """Whether a text is a label, where labels are like that of an example."""
        is_text = isinstance(_plain(label, index), str)
        return text in self.names.values() or (not self.names and is_text and text in self.present)

    def check_given(self, given: str, label: Any, index: int) -> None:
        """Check that a table's label of an example is that of the data set.

        Raises:
            ValueError: if it is not.
        """
        value = _plain(label, index)
        if isinstance(value, str):
            texts = {value}
        elif float(value).is_integer():
            number = str(int(value))
            name = self.names.get(int(value), number)
            is_other = number != name and number in self.names.values()  # names are digits, of other numbers
            texts = {name} if is_other else {name, number}
        else:
            texts = {str(value), f"{value:.3g}", f"{value:.6g}"}  # earlier tables had three digits
        forms = texts | {form(text) for text in texts for form in (in_a_cell, printable)}
        if given not in forms and _without_fraction(given) not in forms:
            hint = "" if self.names or isinstance(value, str) else ", or names=... if the table has names of numbers"
            raise ValueError(
                f"The table says that example {index} has the label {given!r}, but in this data set it has {value!r}: "
                f"it is another data set, or in another order. Pass the training data set of the fit as it was{hint}."
            )

    def like(self, text: str, label: Any, index: int) -> Any:
        """A corrected label in the form of the label that an example has.

        Raises:
            ValueError: if it is not known.
        """
        value = _plain(label, index)
        if isinstance(value, str):
            known: dict[str, Any] = {form: name for name in self.texts for form in (name, in_a_cell(name))}
        else:
            known = {form: number for number, name in self.names.items() for form in (name, in_a_cell(name))}
        found = known.get(text, known.get(_without_fraction(text)))
        if found is None and not isinstance(value, str):
            found = self._number(text, whole=float(value).is_integer())
        if found is None:
            raise ValueError(
                f"The corrected label {text!r} of example {index} is none of those known: "
                f"{', '.join(sorted(self.texts)[:20])}. Write one of these, or its number, or {DROP!r} to leave the "
                "example out; pass names=... to name others."
            )
        return _in_the_form_of(label, found, index)

    def _number(self, text: str, *, whole: bool) -> float | None:
        """A label that is written as a number; None if it is none, or none of a class where labels are of classes."""
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not math.isfinite(number):
            return None
        if self.names:
            is_known = not whole or (number.is_integer() and int(number) in self.names)
        else:
            is_class = whole and _without_fraction(text).isdecimal()  # maybe a new one
            is_known = is_class or number in self.present or self._are_values
        return number if is_known else None

    @property
    def _are_values(self) -> bool:
        """Whether the labels of the data set are those of a regression."""
        return not all(float(each).is_integer() for each in self.present)


def _in_the_form_of(label: Any, found: str | float, index: int) -> Any:
    """A corrected label as the label of an example is: a number, an array, a tensor or a list of one.

    Raises:
        ValueError: if that cannot hold it, as a byte cannot hold 300.
    """
    if isinstance(label, (list, tuple)):
        return type(label)([_in_the_form_of(label[0], found, index)])
    value = type(_plain(label, index))(found)
    try:
        if isinstance(label, Tensor):
            held: Any = torch.full_like(label, float(value) if label.is_floating_point() else int(value))
        elif isinstance(label, np.ndarray):
            held = np.full(label.shape, value, None if isinstance(value, str) else label.dtype)
        else:
            held = type(label)(value)
        fits = _is_same(_plain(held, index), found)
    except (OverflowError, RuntimeError):  # of NumPy, and of PyTorch
        fits = False
    if not fits:
        kind = getattr(label, "dtype", type(label).__name__)
        raise ValueError(
            f"The corrected label {found:.6g} of example {index} does not fit into the {kind} of its label. Correct it "
            "in the table, or store the labels of the data set in a wider type."
        )
    return held


def _is_same(held: str | float, found: str | float) -> bool:
    """Whether a label was kept; of a value, what is left of it in half precision is enough."""
    if held == found or isinstance(held, str) or isinstance(found, str):
        return held == found
    return isinstance(held, float) and not float(found).is_integer() and math.isclose(held, found, rel_tol=1e-2)


def _without_fraction(text: str) -> str:
    """A whole number as pandas writes it in a column with empty cells, "2.0", as "2"; any other text as it is."""
    return text.removesuffix(".0")


def _rows_of(corrections: Corrections) -> list[Mapping[str, Any]]:
    """The rows of a table.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks a column.
    """
    if isinstance(corrections, (str, Path)):
        source = str(corrections)
        with _long_cells(), Path(corrections).open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter)
            rows: list[Mapping[str, Any]] = list(reader)
            columns = set(reader.fieldnames or ())
    else:
        source, rows = "The table", list(corrections)
        columns = set(rows[0]) if rows else set(_NEEDED)
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise ValueError(
            f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: pass the table that "
            "label_issues(...).to_csv wrote, with corrected_label filled in."
        )
    return rows


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let the csv module read texts of more than 131,072 characters."""
    limit = csv.field_size_limit(_MOST_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _indices_of(rows: Sequence[Mapping[str, Any]], n: int) -> list[int]:
    """The index of each row's example.

    Raises:
        ValueError: if one is none, or stands there twice.
    """
    found: list[int] = []
    for row in rows:
        text = _text_of(row["train_index"])
        if not text.removesuffix(".0").isdecimal() or int(float(text)) >= n:
            raise ValueError(f"train_index must be a number from 0 to {n - 1}, the data set's last, but got {text!r}.")
        found.append(int(float(text)))
    index, count = Counter(found).most_common(1)[0] if found else (0, 1)
    if count > 1:
        raise ValueError(f"Example {index} stands in the table {count} times. Keep one row of each.")
    return found


def _place_of_label(dataset: Any, label: str | int | None) -> str | int:
    """Where an item has its label.

    Raises:
        ValueError: if that is not known.
    """
    if not len(dataset):
        raise ValueError("The data set is empty: there is nothing to correct.")
    item = dataset[0]
    if label is None and isinstance(item, Mapping):
        label = next((name for name in _KEYS if name in item), None)
    elif label is None and isinstance(item, (tuple, list)) and len(item) == 2:
        label = 1
    is_there = (
        label in item if isinstance(item, Mapping) else isinstance(label, int) and -len(item) <= label < len(item)
    )
    if label is None or not is_there:
        form = f"mapping with {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(f"An item of the data set is a {form}: say where its label is, as label=..., got {label!r}.")
    return label


def _relabelled(item: Any, where: str | int, label: Any) -> Any:
    """A copy of an item with another label."""
    if isinstance(item, tuple):
        own = range(len(item))[where] if isinstance(where, int) else where  # -1 is the last
        values = [label if place == own else value for place, value in enumerate(item)]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    copied: Any = item.clone() if isinstance(item, Tensor) else copy(item)  # a copy of a tensor has the same numbers
    copied[where] = label
    return copied


def _corrected_row(row: dict[str, Any], index: int, changed: Mapping[int, Any], where: str) -> dict[str, Any]:
    return {where: changed.get(index, row[where])}


def _is_hugging_face(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``; then the package has been imported."""
    package = sys.modules.get("datasets")
    return package is not None and isinstance(dataset, package.Dataset)


def _plain(label: Any, index: int) -> str | float:
    """A label as a text or a number of Python.

    Raises:
        ValueError: if it is neither, as where an example has several labels.
    """
    if isinstance(label, (list, tuple)) and len(label) == 1:
        label = label[0]
    if isinstance(label, (Tensor, np.generic, np.ndarray)) and math.prod(label.shape) == 1:
        label = label.item()
    if not isinstance(label, (str, int, float)):
        raise ValueError(
            f"The label of example {index} is a {type(label).__name__}, but only single labels are corrected: a name "
            "or a number. Say where it is, as label=..."
        )
    return label


def _text_of(value: Any) -> str:
    """A cell as text; what is not there, as pandas has it, too, is empty."""
    return "" if value is None or value != value else str(value).strip()  # NaN is no equal of itself
