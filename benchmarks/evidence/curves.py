"""The study's curves, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(part: str, tables: list[dict[str, Any]], folder: Path) -> None:
    """Draw the curves of a part that has some, a panel for each task.

    Args:
        part: of the study.
        tables: its results.
        folder: where the picture is written, as ``evidence-<part>.svg``.
    """
    panels = {"deletion": _deletion, "mislabel": _mislabel}
    if part == "deletion":
        tables = [each for each in tables if len({row["k"] for row in each["rows"]}) > 1]
    if part not in panels or not tables:
        return
    with mpl.rc_context({"svg.hashsalt": "evidence", "font.size": 8}):
        figure = Figure(figsize=(3.4 * min(3, len(tables)), 2.8 * -(-len(tables) // 3)), layout="constrained")
        places = figure.subplots(-(-len(tables) // 3), min(3, len(tables)), squeeze=False).flatten()
        for place, table in zip(places, tables, strict=False):
            place.set_title(table["title"] if part == "deletion" else f"{table['title']}\n{table['what']}")
            panels[part](place, table)
        for place in places[len(tables) :]:
            place.set_axis_off()
        places[0].legend(fontsize=6)
        figure.savefig(folder / f"evidence-{part}.svg", metadata={"Date": None})


def _deletion(place: Any, table: dict[str, Any]) -> None:
    for method in dict.fromkeys(row["method"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["method"] == method]
        ks = [row["k"] for row in rows]
        mean, low, high = zip(*(row["p"] for row in rows), strict=True)
        place.plot(ks, mean, marker="o", markersize=3, label=method)
        place.fill_between(ks, low, high, alpha=0.15)
    place.axhline(0, color="grey", linewidth=0.5)
    place.set_xlabel("proponents removed")
    place.set_ylabel("change of the probability")


def _mislabel(place: Any, table: dict[str, Any]) -> None:
    for row in table["rows"]:
        place.plot([0, *table["inspected"]], [0, *row["found"]], label=row["method"])
    place.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    place.set_xlabel("share inspected")
    place.set_ylabel("share of wrong labels found")
