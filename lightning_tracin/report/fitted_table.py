"""Tables of the terminal in which one column gives way, so that the numbers of the others stay whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

_LEAST = 8  # cells that are left of the column that gives way


def fitted_table(
    columns: Mapping[str, Sequence[Text]], width: int, *, elastic: str, left: Collection[str] = ()
) -> Table:
    """A table as wide as a terminal; rich by itself would give up numbers for texts.

    Args:
        columns: the cells of each, by its head.
        width: of the terminal, in cells, of which some characters take two.
        elastic: the head of the column that gives way.
        left: the heads of other columns that are no numbers.
    """
    widths = {
        name: max([len(name), *(cell.cell_len for cell in cells)]) for name, cells in columns.items() if name != elastic
    }
    room = width - sum(widths.values()) - 2 * len(widths) - 2
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        if name == elastic:
            table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=max(_LEAST, room))
        else:
            table.add_column(name, justify="left" if name in left else "right", no_wrap=True, min_width=widths[name])
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table
