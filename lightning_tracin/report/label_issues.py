"""The table of label issues: training examples by what speaks against their labels, to print, review and hand back."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lightning_tracin.gradients.printable import in_a_cell, printable, storable, storable_if_known
from lightning_tracin.report.explanation import Example
from lightning_tracin.report.fitted_table import fitted_table
from lightning_tracin.report.rich_repr import RichRepr, data_frame
from lightning_tracin.storage.files import output_file

if TYPE_CHECKING:
    import pandas as pd

_PRINTED, _LABEL_WIDTH = 20, 14

#: The columns, in their order; the page writes the same.
COLUMNS = (
    "train_index",
    "is_label_issue",
    "label_score",
    "given_label",
    "predicted_label",
    "corrected_label",
    "self_influence",
    "rank",
    "rank_in_class",
    "text",
)


@dataclass(frozen=True)
class LabelIssue:
    """A training example, and what speaks against its label.

    Attributes:
        example: what it says, its label included; its index is that in the training data set.
        is_label_issue: whether its label is probably wrong; None where what the model said of it is not known.
        label_score: from 0 to 1, lower is worse; None where it is not known.
        predicted_label: what the model says of it; None where that is not known.
        self_influence: its influence on itself.
        rank: its place by that, from 1 for the highest.
        rank_in_class: its place among the examples of its label; None without one.
    """

    example: Example
    is_label_issue: bool | None
    label_score: float | None
    predicted_label: str | None
    self_influence: float
    rank: int
    rank_in_class: int | None

    @property
    def row(self) -> dict[str, Any]:
        """The row of the table, without a corrected label: that is for people to fill in."""
        return {
            "train_index": self.example.index,
            "is_label_issue": self.is_label_issue,
            "label_score": self.label_score,
            "given_label": storable_if_known(self.example.label),
            "predicted_label": storable_if_known(self.predicted_label),
            "corrected_label": None,
            "self_influence": self.self_influence,
            "rank": self.rank,
            "rank_in_class": self.rank_in_class,
            "text": storable(self.example.text),
        }


@dataclass(frozen=True, repr=False, eq=False)
class LabelIssues(RichRepr):
    """Training examples by their self-influence, highest first, with cleanlab's names for what is said of labels.

    ``print(issues)`` shows the first. :meth:`to_csv` writes a table to review: fill in ``corrected_label`` where the
    label is wrong, and :func:`~lightning_tracin.apply_corrections` gives a data set with the corrected labels.

    Attributes:
        issues: those that are listed.
        n_train: number of training examples, listed or not.
        n_issues: number of those whose label is probably wrong; None where that is not known.
        method: what measured self-influence, in words.
        agreement: the share of training examples of which the model says the label, by what it said of them on the mean
            over the checkpoints that count; None where that is not known.
    """

    issues: Sequence[LabelIssue]
    n_train: int
    n_issues: int | None
    method: str
    agreement: float | None = None

    @property
    def finding(self) -> str:
        """How many labels are probably wrong, in words; empty where that is not known."""
        if self.n_issues is None:
            return ""
        few = {0: "No label can be called", 1: "1 label is"}
        found = few.get(self.n_issues, f"{self.n_issues:,} labels are")
        said = "" if self.agreement is None else f"; the model says the label of {_percent(self.agreement)}"
        return f"{found} probably wrong{said}"

    def __len__(self) -> int:
        return len(self.issues)

    def __repr__(self) -> str:
        return f"LabelIssues(n={len(self)}, n_train={self.n_train}, n_issues={self.n_issues})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.n_train:,} training examples by self-influence ({printable(self.method)})")
        if self.finding:
            yield Text(self.finding)
        yield _printed(self.issues[:_PRINTED], options.max_width)
        if len(self) > _PRINTED:
            yield f"{_PRINTED} of {len(self):,}; to_csv(path) and to_pandas() have all"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each example: the rows of :meth:`to_pandas`."""
        return [issue.row for issue in self.issues]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each example, highest self-influence first.

        Returns:
            Columns ``train_index``, ``is_label_issue``, ``label_score``, ``given_label``, ``predicted_label``,
            ``corrected_label`` (empty), ``self_influence``, ``rank``, ``rank_in_class`` and ``text``.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        return data_frame(self.rows(), columns=COLUMNS)

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows of :meth:`to_pandas` as CSV in UTF-8, for :func:`~lightning_tracin.apply_corrections`.

        No cell begins a formula of a spreadsheet: a text that would is given an apostrophe.

        Returns:
            The path.

        Raises:
            OSError: if the file cannot be written.
        """
        path = Path(path)
        with output_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            self.write_csv(file)
        return path

    def write_csv(self, file: TextIO) -> None:
        """Write what :meth:`to_csv` does to an open file."""
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in self.rows():
            writer.writerow({name: in_a_cell(each) if isinstance(each, str) else each for name, each in row.items()})


def _percent(share: float) -> str:
    """A share in percent, with a decimal near 100, which only all are."""
    return f"{math.floor(1000 * share) / 10:.1f}%" if 0.99 < share < 1 else f"{share:.0%}"


def _cut(label: str) -> str:
    """The beginning of a label, by what it takes in a terminal."""
    return set_cell_size(label, _LABEL_WIDTH) if cell_len(label) > _LABEL_WIDTH else label


def _printed(issues: Sequence[LabelIssue], width: int) -> Table:
    """The table of some examples, as wide as a terminal: of long texts less is shown."""
    styles = ["bold" if issue.is_label_issue else "" for issue in issues]
    predicted = [_cut(printable(issue.predicted_label or "")) for issue in issues]
    scores = ["" if issue.label_score is None else f"{issue.label_score:.2f}" for issue in issues]
    columns = {
        "rank": [Text(str(issue.rank)) for issue in issues],
        "train": [Text(str(issue.example.index)) for issue in issues],
        "label score": [Text(score) for score in scores],
        "given": [Text(_cut(printable(issue.example.label or ""))) for issue in issues],
        "predicted": [Text(label, style=style) for label, style in zip(predicted, styles, strict=True)],
        "text": [Text(printable(issue.example.text)) for issue in issues],
    }
    return fitted_table(columns, width, elastic="text", left=("given", "predicted"))
