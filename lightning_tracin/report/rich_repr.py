"""How tables and results show themselves: as text, in a notebook, as a pandas table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.jupyter import JupyterMixin

if TYPE_CHECKING:
    import pandas as pd


class RichRepr(JupyterMixin):
    """What rich can print: ``print`` gives its text, and a notebook shows it with its colours."""

    def __str__(self) -> str:
        console = Console(force_jupyter=False)  # In a notebook, capturing would also display.
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def data_frame(rows: Sequence[Any], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows as a pandas table.

    Raises:
        ModuleNotFoundError: without pandas.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_pandas needs pandas: pip install lightning-tracin[pandas]") from error
    return pd.DataFrame(rows, columns=columns)
