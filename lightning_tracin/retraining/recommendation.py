"""Recommendation: which method to trust for a question, as a table and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lightning_tracin.gradients.printable import printable
from lightning_tracin.report.plots import Dots, plot_dots
from lightning_tracin.report.rich_repr import RichRepr, data_frame
from lightning_tracin.retraining.intervals import student
from lightning_tracin.scoring.methods import Method

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What scores are wanted for: to show a few examples that explain a prediction, or to weigh all data.
Question: TypeAlias = Literal["explain", "weigh"]

_BLIND = ("random", "same label")  # baselines that do not look at what is in an example

_MEASURED = {
    "explain": "{change} without the {k} strongest proponents",
    "weigh": "LDS: rank correlation of summed scores with {n} retrainings on halves",
}


@dataclass(frozen=True)
class Measured:
    """What was measured of a method or a baseline; higher is better.

    Attributes:
        name: its name.
        method: what to ask by; None for a baseline, which has no model.
        value: what was measured.
        error: its standard error.
        behind: how far it is behind the best method.
        behind_error: the standard error of that, taken pair by pair.
        n: how many independent values both errors are over: test examples, or halves.
        together: how many methods it is one of. What is called clear is so for all of them at once, as the best of
            many is easily above another by chance.
    """

    name: str
    method: Method | None
    value: float
    error: float
    behind: float
    behind_error: float
    n: int
    together: int = 1

    @property
    def width(self) -> float:
        """Half the width of the 95 % interval of the value, by Student's t."""
        return student(self.n) * self.error

    @property
    def behind_width(self) -> float:
        """Half the width of the 95 % interval of how far it is behind."""
        return student(self.n) * self.behind_error

    @property
    def is_positive(self) -> bool:
        """Whether the value is clearly above 0."""
        return self.value > self._clear * self.error

    @property
    def is_behind(self) -> bool:
        """Whether it is clearly behind the best method."""
        return self.behind > self._clear * self.behind_error

    @property
    def is_ahead(self) -> bool:
        """Whether it is clearly ahead of the best method, as a baseline may be."""
        return -self.behind > self._clear * self.behind_error

    @property
    def _clear(self) -> float:
        return student(self.n, self.together)


@dataclass(frozen=True, repr=False, eq=False)
class Recommendation(RichRepr):
    """What to use, and how sure that is. ``print(recommendation)`` shows the table.

    Attributes:
        question: "explain" or "weigh".
        what: what was measured, in words.
        measured: methods and baselines, best first.
        n_fits: how many fits it took.
        ceiling: what perfect scores would reach, of an LDS; None where it is not known.
        notes: what to bear in mind.
    """

    question: Question
    what: str
    measured: Sequence[Measured]
    n_fits: int
    ceiling: float | None = None
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        return f"Recommendation(question={self.question!r}, best={self.best.name!r}, clear={self.is_clear})"

    @property
    def best(self) -> Measured:
        """The method with the highest value."""
        return next(each for each in self.measured if each.method is not None)

    @property
    def tied(self) -> list[Measured]:
        """The other methods that cannot be told from the best one."""
        return [each for each in self.measured if each.method is not None and each != self.best and not each.is_behind]

    @property
    def is_clear(self) -> bool:
        """Whether the best method is clearly above 0, and better than all others, baselines too."""
        return self.best.is_positive and all(each.is_behind for each in self.measured if each != self.best)

    def sentence(self) -> str:
        """What to use, or that it cannot be told."""
        best = repr(self.best.name)
        baselines = [each for each in self.measured if each.method is None]
        unbeaten = [each for each in baselines if each.is_ahead or (each.name in _BLIND and not each.is_behind)]
        if unbeaten or not self.best.is_positive:
            above = _listed(unbeaten) if self.best.is_positive else "0"
            return (
                f"No method can be recommended: the best, {best}, is not above {above} by these retrainings. Run more, "
                "or trust none."
            )
        if sum(each.method is not None for each in self.measured) == 1:
            told = f"{best} is the only method."
        elif not self.tied:
            told = f"Use {best}: it is better than all other methods, beyond what chance makes of that many."
        else:
            told = (
                f"{best} has the highest value, but cannot be told from {_listed(self.tied)} by these retrainings: run "
                "more, or use the cheapest."
            )
        level = [each for each in baselines if not each.is_behind]
        if level:
            told += f" It cannot be told from {_listed(level)} (no model)."
        return told

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"To {self.question}: {self.what}; {self.n_fits} fits; 95 % intervals")
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("", "value", "behind the best", ""):
            table.add_column(name, justify="left" if not name else "right")
        for each in self.measured:
            is_best = each == self.best
            verdict = "no model" if each.method is None else ""
            told = "" if is_best else f"{each.behind:.2f} ± {each.behind_width:.2f}"
            style = "bold" if is_best else "" if each.method is not None else "italic"
            table.add_row(
                Text(printable(each.name), style=style), f"{each.value:.2f} ± {each.width:.2f}", told, Text(verdict)
            )
        yield table
        if self.ceiling is not None:
            yield Text(f"Perfect scores would reach {self.ceiling:.2f}: another seed gives another model.")
        yield Text(printable(self.sentence()), style="bold")
        yield from (Text(printable(note), style="italic") for note in self.notes)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method and baseline, best first: the rows of :meth:`to_pandas`."""
        return [
            {
                "name": each.name,
                "method": None if each.method is None else str(each.method),
                "value": each.value,
                "error": each.error,
                "behind": each.behind,
                "behind_error": each.behind_error,
            }
            for each in self.measured
        ]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each method and baseline, best first.

        Returns:
            Columns ``name``, ``method`` (None of a baseline), ``value``, ``error`` (its standard error), ``behind``
            (how far behind the best method) and ``behind_error``.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        return data_frame(self.rows())

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw what was measured, with 95 % intervals.

        Args:
            ax: where to draw; a new figure by default.

        Raises:
            ModuleNotFoundError: without matplotlib: ``pip install lightning-tracin[plot]``.
        """
        values = [(each.value, each.value - each.width, each.value + each.width) for each in self.measured]
        names = [each.name for each in self.measured]
        return plot_dots([Dots("95 % intervals", values)], names, f"To {self.question}", self.what, ax)


def _listed(measured: Sequence[Measured]) -> str:
    return ", ".join(repr(each.name) for each in measured)


def described(question: Question, **facts: Any) -> str:
    """What is measured to answer a question, in words."""
    return _MEASURED[question].format(**facts)
