"""Charts with matplotlib: scores, words, labels and self-influence.

Each function draws on the axes that it is given, or on a new figure, and returns both; nothing of matplotlib's own
settings is changed. Words and labels are printed as they are, whatever signs they hold.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
from torch import Tensor

from lightning_tracin.report.palette import AGAINST, FOR, FURTHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What a chart shows.
Kind: TypeAlias = Literal["scores", "words", "labels", "self_influence"]

_N_BINS = 50

_N_BARS = 15

_NAME_LENGTH = 24

_AS_IT_IS: dict[str, Any] = {"parse_math": False, "usetex": False}  # A $ in a word begins no formula.

_SCORE = "influence score (positive: made the test example's target likelier)"

_FURTHER_FONTS = (  # Where installed, they have the signs that matplotlib's own font lacks.
    *(f"Noto Sans CJK {region}" for region in ("SC", "JP", "KR")),
    *(f"Noto Sans {script}" for script in ("Devanagari", "Arabic", "Hebrew", "Thai", "Bengali", "Tamil")),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Hiragino Sans", "Arial Unicode MS"),
)


def pyplot() -> ModuleType:
    """Matplotlib's pyplot, imported when a chart is asked for.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib import pyplot as imported
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot needs matplotlib: pip install lightning-tracin[plot]") from error
    return imported


def plot_scores(scores: Tensor, title: str = "Scores", ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The distribution of scores, on a logarithmic scale: positive ones in blue, negative ones in orange.

    Args:
        scores: (n,) of pairs of a training and a test example.
        title: of the chart.
        ax: where to draw; a new figure by default.
    """
    fig, ax = _figure(ax, height=3.6)
    _histogram(ax, scores)
    _label(ax, title, xlabel=_SCORE, ylabel="pairs (log scale)")
    return fig, ax


def plot_words(words: Iterable[tuple[str, float]], title: str = "Words", ax: Axes | None = None) -> tuple[Figure, Axes]:
    """What words add to a score, or to the sum of several: the strongest, the first of them at the top.

    Args:
        words: each word and its term.
        title: of the chart.
        ax: where to draw; a new figure by default.
    """
    ordered = sorted(words, key=lambda word: -abs(word[1]))
    shown = ordered[:_N_BARS]
    fig, ax = _figure(ax, height=1.4 + 0.27 * len(shown))
    terms = [term for _, term in shown]
    ax.barh(range(len(shown)), terms, color=[FOR if term >= 0 else AGAINST for term in terms])
    _name_bars(ax, [word for word, _ in shown])
    ax.axvline(0, color="black", linewidth=0.8)
    total = f"all {len(ordered)} words add up to {sum(term for _, term in ordered):+.3g}"
    _label(ax, title, xlabel=f"what the word adds ({total})")
    return fig, ax


def plot_labels(
    proponents: Sequence[str], opponents: Sequence[str], title: str = "Labels", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """How many of the proponents (blue) and of the opponents (orange) have each label, most frequent at the top.

    Args:
        proponents: the label of each.
        opponents: the label of each.
        title: of the chart.
        ax: where to draw; a new figure by default.
    """
    from matplotlib.ticker import MaxNLocator

    counts = Counter(proponents), Counter(opponents)
    ordered = [label for label, _ in (counts[0] + counts[1]).most_common()]
    shown = ordered[:_N_BARS]
    fig, ax = _figure(ax, height=1.6 + 0.42 * len(shown))
    sides = (("proponents", FOR, -0.2), ("opponents", AGAINST, 0.2))
    for (name, colour, shift), of_side in zip(sides, counts, strict=True):
        places = [place + shift for place in range(len(shown))]
        ax.barh(places, [of_side[label] for label in shown], height=0.38, color=colour, label=name)
    _name_bars(ax, shown)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    left = f" ({len(shown)} of {len(ordered)} labels)" if len(shown) < len(ordered) else ""
    _label(ax, title, xlabel=f"number of training examples{left}")
    return fig, ax


def plot_self_influence(values: Tensor, k: int = 10, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The distribution of self-influence over the training set, on a logarithmic scale; the k highest are marked.

    Args:
        values: (n_train,) by index in the training data set.
        k: how many to mark.
        ax: where to draw; a new figure by default.
    """
    fig, ax = _figure(ax, height=3.6)
    _histogram(ax, values)
    highest = values.topk(min(k, len(values)))
    numbers = textwrap.fill(", ".join(map(str, highest.indices.tolist())), 40)
    heights = [0.02] * len(highest.indices)
    marks: dict[str, Any] = {
        "marker": "v",
        "linestyle": "",
        "color": AGAINST,
        "markeredgecolor": "black",
        "clip_on": False,
    }
    name = f"{len(heights)} highest, training examples\n{numbers}"
    ax.plot(highest.values.tolist(), heights, transform=ax.get_xaxis_transform(), label=name, **marks)
    ax.legend(frameon=False, loc="upper right")
    title = f"Self-influence of {len(values)} training examples"
    _label(ax, title, xlabel="self-influence (high: mislabelled or atypical)", ylabel="training examples (log scale)")
    return fig, ax


@dataclass(frozen=True)
class Dots:
    """Values of one kind, in a chart of several.

    Attributes:
        name: what the legend says.
        values: each with the two ends of its interval; NaN for one that is not there.
    """

    name: str
    values: Sequence[tuple[float, float, float]]


def plot_dots(
    groups: Sequence[Dots], names: Sequence[str], title: str, xlabel: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Values with their intervals, a line of the chart for each name, the first at the top; a colour for each group.

    Args:
        groups: the values of each have the length of ``names``.
        names: of the lines.
        title: of the chart.
        xlabel: what the values are.
        ax: where to draw; a new figure by default.
    """
    fig, ax = _figure(ax, height=1.6 + 0.3 * len(names))
    for number, group in enumerate(groups):
        shift = 0.6 * (number - (len(groups) - 1) / 2) / max(1, len(groups))
        middle, low, high = (np.array([each[column] for each in group.values]) for column in range(3))
        ends = np.stack([middle - low, high - middle])
        places = np.arange(len(names)) + shift
        colour = FOR if number == 0 else FURTHER[(number - 1) % len(FURTHER)]
        ax.errorbar(middle, places, xerr=ends, fmt="o", markersize=4, linewidth=1.2, color=colour, label=group.name)
    ax.axvline(0, color="black", linewidth=0.8)
    _name_bars(ax, names)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _label(ax, title, xlabel=xlabel)
    return fig, ax


def _histogram(ax: Axes, values: Tensor) -> None:
    """Bars of how many values lie between equally distant edges, multiples of the distance: no bar is of both signs."""
    numbers = values.double().numpy()
    largest, extent = float(np.abs(numbers).max()), float(np.ptp(numbers))
    width = (
        extent if extent > 1e-6 * largest else largest or 1.0
    ) / _N_BINS  # Values that differ by rounding alone are one bar.
    edges = width * np.arange(np.floor(numbers.min() / width), np.floor(numbers.max() / width) + 2)
    counts, _ = np.histogram(numbers, edges)
    colours = [FOR if edge >= 0 else AGAINST for edge in edges[:-1]]
    ax.bar(edges[:-1], counts, width, align="edge", color=colours, edgecolor="white", linewidth=0.3)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)  # On a logarithmic scale from 1, a bar of height 1 would not be seen.


def _name_bars(ax: Axes, names: Sequence[str]) -> None:
    """Name horizontal bars, the first at the top."""
    from matplotlib import font_manager, rcParams

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [*rcParams["font.family"], *(font for font in _FURTHER_FONTS if font in installed)]
    cut = [name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…" for name in names]
    ax.set_yticks(range(len(cut)), cut, fontfamily=fonts, **_AS_IT_IS)
    ax.margins(y=0.02)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)


def _label(ax: Axes, title: str, *, xlabel: str, ylabel: str = "") -> None:
    ax.set_title(title, loc="left", fontsize="medium", **_AS_IT_IS)
    ax.set_xlabel(xlabel, **_AS_IT_IS)
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)


def _figure(ax: Axes | None, height: float) -> tuple[Figure, Axes]:
    """The axes to draw on, and their figure; a new one without."""
    if ax is None:
        return pyplot().subplots(figsize=(7, height), layout="constrained")  # type: ignore[no-any-return]
    return cast("Figure", ax.figure), ax
