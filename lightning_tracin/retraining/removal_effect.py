"""RemovalEffect: what retraining without some examples changed, as a table, a sentence, a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_tracin.gradients.printable import printable
from lightning_tracin.report.fitted_table import fitted_table
from lightning_tracin.report.plots import Dots, plot_dots
from lightning_tracin.report.rich_repr import RichRepr, data_frame
from lightning_tracin.results.rows import checked_row
from lightning_tracin.retraining.intervals import half_width
from lightning_tracin.retraining.removals import PROPONENTS
from lightning_tracin.retraining.targets import Quantity

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHRASES = {
    PROPONENTS: "its {k} proponents",
    "random": "{k} random ones",
    "same label": "{k} random ones of the same label",
    "tf-idf": "the {k} nearest by TF-IDF",
}
_LISTED = 30  # test examples that are printed


class Change(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        mean: the mean.
        low: the interval's lower end.
        high: its upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, repr=False, eq=False)
class RemovalEffect(RichRepr):
    """How the targets of test examples changed when a model was trained without some training examples.

    ``print(effect)`` shows a table; :meth:`sentence` says it of one test example.

    Attributes:
        k: how many training examples were left out.
        seeds: of the fits.
        quantity: what is measured: the "probability" of the target, or where no class is said, the "loss".
        test_indices: (n,) int64, the test examples' indices in their data set.
        targets: what is explained of each.
        before: (n, s) float32, with nothing left out, for each seed.
        changes: by what was left out ("proponents", "random", ...), (n, s) float32: with it left out minus before, of
            the same seed; NaN where there was not enough to leave out.
        notes: what is missing, and why.
        test_rows: (n,) int64, the test examples' rows of the result; None where they are all of it.
    """

    k: int
    seeds: tuple[int, ...]
    quantity: Quantity
    test_indices: Tensor
    targets: Sequence[str]
    before: Tensor
    changes: Mapping[str, Tensor]
    notes: Sequence[str] = ()
    test_rows: Tensor | None = None

    def __repr__(self) -> str:
        return f"RemovalEffect(n_test={len(self.before)}, k={self.k}, seeds={len(self.seeds)})"

    def change(self, row: int, removed: str = PROPONENTS) -> Change:
        """The change for one test example, with an interval over seeds by Student's t.

        Args:
            row: of this effect: its place in ``test_indices``.
            removed: what was left out.

        Raises:
            IndexError: if there is no such row.
        """
        return _change(self.changes[removed][checked_row(row, self.test_indices)])

    def mean_change(self, removed: str = PROPONENTS, against: str | None = None) -> Change:
        """The mean change of these test examples, with an interval over seeds by Student's t.

        Test examples of one seed share retrainings (the one with nothing removed, and random removals), so each seed
        counts as one observation: their mean. What it says of test examples that were not asked about is another
        question, for :class:`~lightning_tracin.metrics.DeletionCurve`.

        Args:
            removed: what was left out.
            against: what else was left out, whose change is taken from it.
        """
        values = self.changes[removed] - (0 if against is None else self.changes[against])
        return _change(values[~values.isnan().any(1)].mean(0))

    def beats(self, against: str = "random") -> Tensor:
        """For which test examples the proponents matter more than something else.

        Args:
            against: what else was left out.

        Returns:
            (n,) bool, whether the 95 % interval of the difference over seeds, pair by pair, leaves out 0.
        """
        differences = self._worse(self.changes[PROPONENTS]) - self._worse(self.changes[against])
        return differences.mean(1) - half_width(differences) > 0

    def sentence(self, row: int) -> str:
        """What was found for one test example, with 95 % intervals over seeds.

        Args:
            row: of this effect: its place in ``test_indices``.

        Raises:
            IndexError: if there is no such row.
        """
        row = checked_row(row, self.test_indices)
        phrases = []
        for removed in self.changes:
            each = self.change(row, removed)
            if each.mean != each.mean:
                continue
            size = f"{abs(each.mean):.2f} ± {each.high - each.mean:.2f}"
            name = _PHRASES[removed].format(k=self.k)
            if removed == PROPONENTS:
                verb = "lowers" if each.mean < 0 else "raises"
                size = f"{verb} the {self.quantity} of {printable(self.targets[row])} by {size}"
                phrases.append(f"removing {name} {size}")
            else:
                phrases.append(f"{name} {'lower' if each.mean < 0 else 'raise'} it by {size}")
        return f"Test example {int(self.test_indices[row])}: {'; '.join(phrases)}"

    def summary(self) -> str:
        """What was found for all test examples together, with 95 % intervals over seeds."""
        parts = []
        for removed in self.changes:
            mean, low, high = self.mean_change(removed)
            parts.append(
                f"without {_PHRASES[removed].format(k=self.k)} {_signed(mean)} [{_signed(low)}, {_signed(high)}]"
            )
        lines = [f"Mean change of the target's {self.quantity}: {'; '.join(parts)}."]
        for against in self.changes:
            if against != PROPONENTS:
                mean, low, high = self.mean_change(PROPONENTS, against)
                more, less = (high < 0, low > 0) if self.quantity == "probability" else (low > 0, high < 0)
                told = "matter more than" if more else "matter less than" if less else "cannot be told from"
                compared = (self.changes[PROPONENTS] - self.changes[against]).isfinite().all(1)
                alone = f"{int(self.beats(against).sum())} of {int(compared.sum())}"
                lines.append(
                    f"Proponents {told} {_PHRASES[against].format(k=self.k)}: difference {_signed(mean)} "
                    f"[{_signed(low)}, {_signed(high)}]; they matter more for {alone} test examples by themselves."
                )
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(
            f"{len(self.before)} test examples, {self.k} training examples removed, {len(self.seeds)} seeds; "
            "95 % intervals over seeds"
        )
        yield Text(self.summary())
        yield from (Text(printable(note), style="italic") for note in self.notes)
        yield self._printed(options.max_width)
        if len(self.before) > _LISTED:
            yield f"{_LISTED} of {len(self.before)}; to_pandas() has all"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each test example, what was left out, and seed: the rows of :meth:`to_pandas`."""
        rows = range(len(self.before)) if self.test_rows is None else self.test_rows.tolist()
        return [
            {
                "test_row": rows[row],
                "test_index": int(self.test_indices[row]),
                "target": self.targets[row],
                "removed": removed,
                "seed": seed,
                "before": float(self.before[row, number]),
                "change": float(values[row, number]),
            }
            for removed, values in self.changes.items()
            for row in range(len(self.before))
            for number, seed in enumerate(self.seeds)
        ]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each test example, what was left out, and seed.

        Returns:
            Columns ``test_row`` (row of the result), ``test_index`` (index in the test data set), which join it with
            :meth:`InfluenceResult.to_pandas`, ``target``, ``removed``, ``seed``, ``before`` (the probability, or loss,
            with nothing left out) and ``change``.

        Raises:
            ModuleNotFoundError: without pandas: ``pip install lightning-tracin[pandas]``.
        """
        return data_frame(self.rows())

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw each test example's changes, with their intervals over seeds, and in the last line their means.

        Args:
            ax: where to draw; a new figure by default.

        Raises:
            ModuleNotFoundError: without matplotlib: ``pip install lightning-tracin[plot]``.
        """
        n = min(len(self.before), _LISTED)
        names = [f"{int(self.test_indices[row])}: {self.targets[row]}" for row in range(n)]
        groups = [
            Dots(removed, [*(self.change(row, removed) for row in range(n)), self.mean_change(removed)])
            for removed in self.changes
        ]
        title = f"{self.k} training examples removed, {len(self.seeds)} seeds, 95 % intervals over seeds"
        label = f"change of the target's {self.quantity}"
        return plot_dots(groups, [*names, f"mean of {len(self.before)}"], title, label, ax)

    def _printed(self, width: int) -> Table:
        """The table of test examples, as wide as a terminal: of a long target less is shown, of numbers all."""
        rows = range(min(len(self.before), _LISTED))
        columns = {
            "test": [Text(str(int(self.test_indices[row]))) for row in rows],
            "target": [Text(printable(self.targets[row])) for row in rows],
            "before": [Text(f"{float(self.before[row].mean()):.2f}") for row in rows],
            **{removed: [self._cell(row, removed) for row in rows] for removed in self.changes},
        }
        return fitted_table(columns, width, elastic="target")

    def _cell(self, row: int, removed: str) -> Text:
        each = self.change(row, removed)
        if each.mean != each.mean:
            return Text("", style="dim")
        clear = removed == PROPONENTS and all(
            bool(self.beats(other)[row]) for other in self.changes if other != removed
        )
        return Text(f"{_signed(each.mean)} ± {each.high - each.mean:.2f}", style="bold" if clear else "")

    def _worse(self, changes: Tensor) -> Tensor:
        """Changes that are positive where the target became less likely."""
        return -changes if self.quantity == "probability" else changes


def _change(values: Tensor) -> Change:
    """The mean of seeds (s,), and its interval."""
    mean, width = float(values.mean()), float(half_width(values))
    return Change(mean, mean - width, mean + width)


def _signed(value: float) -> str:
    """A number with its sign; none for what is rounded to zero.

    Example:
        >>> _signed(-0.412), _signed(0.3), _signed(-0.004)
        ('-0.41', '+0.30', '0.00')
    """
    return f"{value:+.2f}" if f"{abs(value):.2f}" != "0.00" else "0.00"
