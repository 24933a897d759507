from __future__ import annotations

import io
import shutil
import sys
import warnings
from collections import Counter, defaultdict

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_hex
from toy import N_TEST, N_TRAIN, fitted, loader, test_texts, texts

from lightning_tracin import InfluenceResult, TracInLast
from lightning_tracin.report import plots


@pytest.fixture(autouse=True)
def on_agg():
    """Charts are drawn without a screen and closed, and matplotlib's settings are those of before."""
    before = dict(mpl.rcParams)
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")
    changed = {name for name, value in mpl.rcParams.items() if value != before[name]}
    assert changed <= {"backend", "backend_fallback"}


@pytest.fixture(scope="module")
def result(toy):
    return toy.influence(loader(test_texts()))


@pytest.fixture(scope="module")
def kept(toy):
    return toy.influence(loader(test_texts()), k=3)


def drawn(fig) -> None:
    """Draw a figure; a sign that no font has is matplotlib's to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        fig.savefig(io.BytesIO())


def named_bars(ax) -> dict[str, float]:
    """The lengths of horizontal bars by their names, from the top."""
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert ax.yaxis_inverted()
    return dict(zip(names, (bar.get_width() for bar in ax.patches), strict=True))


def binned(ax) -> list[tuple[float, float, float, str]]:
    """From, to, count and colour of each bar of a histogram."""
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height(), bar.get_facecolor()) for bar in ax.patches]
    return [(start, stop, count, to_hex(colour).upper()) for start, stop, count, colour in bars]


def assert_counts(ax, values: torch.Tensor) -> None:
    """Every bar is as high as there are values in it, and of the colour of their sign; together they hold all."""
    margin = 1e-9 * float(values.abs().max())
    for start, stop, count, colour in binned(ax):
        least, most = (int(((values >= start + shift) & (values < stop - shift)).sum()) for shift in (margin, -margin))
        assert least <= count <= most
        assert colour == (plots.FOR if start >= -margin else plots.AGAINST)
        assert start >= -margin or stop <= margin
    assert sum(count for _, _, count, _ in binned(ax)) == values.numel()


@pytest.mark.parametrize("row", [None, 2])
def test_scores(result, row):
    fig, ax = result.plot("scores", row)
    assert_counts(ax, (result.scores if row is None else result.scores[row]).double().flatten())
    drawn(fig)
    assert "score" in ax.get_xlabel()
    assert str(N_TRAIN) in ax.get_title(loc="left")


@pytest.mark.parametrize("row", [None, 2])
def test_scores_of_the_strongest_only_are_counted_once(toy, result, row):
    for k in (3, 12):  # 12 on either side of 20: some are on both
        kept = toy.influence(loader(test_texts()), k=k)
        _, ax = kept.plot("scores", row)
        indices = torch.cat([kept.proponents(k).indices, kept.opponents(k).indices], 1)
        rows = range(N_TEST) if row is None else [row]
        expected = torch.cat([result.scores[each, indices[each].unique()] for each in rows])
        assert_counts(ax, expected.double())
        assert f"the {k} most positive and most negative of" in ax.get_title(loc="left")


def test_words_of_a_pair(result):
    index = int(result.proponents(1).indices[2, 0])
    fig, ax = result.plot("words", 2, index)
    assert named_bars(ax) == pytest.approx(dict(result.words(2, index)))
    assert list(named_bars(ax)) == [word for word, _ in result.words(2, index)]
    for bar in ax.patches:
        assert to_hex(bar.get_facecolor()).upper() == (plots.FOR if bar.get_width() >= 0 else plots.AGAINST)
    drawn(fig)
    assert f"{sum(term for _, term in result.words(2, index)):+.3g}" in ax.get_xlabel()


def test_words_of_proponents(result, kept):
    expected: dict[str, float] = defaultdict(float)
    for index in result.proponents(3).indices[2].tolist():
        for word, term in result.words(2, index):
            expected[word] += term
    strongest = dict(sorted(expected.items(), key=lambda word: -abs(word[1]))[:15])
    assert named_bars(result.plot("words", 2, k=3)[1]) == pytest.approx(strongest)
    assert named_bars(kept.plot("words", 2)[1]) == pytest.approx(strongest)


def test_words_of_all_pairs(result):
    _, ax = result.plot("words")
    table = result.word_table(n=None)
    net = dict(zip(table.words, table.values.sum((1, 2)).tolist(), strict=True))
    bars = named_bars(ax)
    assert len(bars) == 15
    assert bars == pytest.approx({word: net[word] for word in bars})
    assert min(map(abs, bars.values())) >= max(abs(term) for word, term in net.items() if word not in bars)
    assert f"{float(result.scores.double().sum()):+.3g}" in ax.get_xlabel()


@pytest.mark.parametrize("row", [None, 2])
def test_labels(result, kept, row):
    labels = texts().tensors[1]
    rows = slice(None) if row is None else [row]
    for each in (result.plot("labels", row, k=3), kept.plot("labels", row)):
        fig, ax = each
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["proponents", "opponents"]
        for container, top, sign in zip(
            ax.containers, (result.proponents(3), result.opponents(3)), (1, -1), strict=True
        ):
            pushed = top.indices[rows][top.values[rows] * sign > 0]
            counts = Counter(str(int(label)) for label in labels[pushed])
            assert [bar.get_width() for bar in container] == [counts[name] for name in names]
        drawn(fig)


def test_self_influence(result):
    fig, ax = result.plot("self_influence", k=4)
    values = result.self_influence()
    assert_counts(ax, values.double())
    (marks,) = ax.lines
    assert sorted(marks.get_xdata()) == pytest.approx(sorted(values.tolist())[-4:])
    named = ax.get_legend().get_texts()[0].get_text()
    assert named.splitlines()[1] == ", ".join(str(index) for index in values.topk(4).indices.tolist())
    drawn(fig)


@pytest.mark.parametrize("kind", ["scores", "words", "labels", "self_influence"])
def test_on_given_axes_no_figure_is_made(result, kind):
    fig, (left, right) = pyplot.subplots(1, 2)
    pyplot.sca(right)
    returned, ax = result.plot(kind, ax=left)
    assert (returned, ax) == (fig, left)
    assert pyplot.get_fignums() == [fig.number]
    assert pyplot.gca() is right
    assert left.patches
    assert not right.patches


def test_a_figure_can_be_closed(result):
    fig, _ = result.plot()
    pyplot.close(fig)
    assert not pyplot.get_fignums()


def test_words_are_printed_as_they_are():
    words = ["$x_1$ and $y^2$", "世界杯", "שלום", "[bold]", r"\frac{", "_", "", "w" * 500]
    fig, ax = plots.plot_words([(word, 8.0 - number) for number, word in enumerate(words)])
    drawn(fig)
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels[:-1]] == words[:-1]
    assert not any(label.get_parse_math() for label in labels)
    assert labels[-1].get_text() == "w" * 23 + "…"
    assert ax.get_window_extent().width > 0.4 * fig.bbox.width  # long names leave room for the bars


def test_long_labels_and_many_of_them():
    labels = [f"{number} {'entertainment ' * 9}$" for number in range(40)]
    fig, ax = plots.plot_labels(labels, labels[:1])
    drawn(fig)
    assert len(ax.get_yticklabels()) == 15
    assert "15 of 40 labels" in ax.get_xlabel()


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0 + 1e-9], [-1e-12, 2e-12], [5.0], [-2.0, -1.0]])
def test_histograms_of_few_and_of_equal_values(values):
    fig, ax = plots.plot_scores(torch.tensor(values, dtype=torch.float64))
    drawn(fig)
    assert sum(count for _, _, count, _ in binned(ax)) == len(values)


def test_without_its_trace_only_scores_and_unknown_labels_are_left(tmp_path):
    path = fitted(tmp_path / "trace").influence(loader(test_texts())).save(tmp_path / "result.safetensors", k=0)
    shutil.rmtree(tmp_path / "trace")
    result = InfluenceResult.load(path)
    assert result.plot("scores", 0)[1].patches
    _, ax = result.plot("labels", k=2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["(not known)"]
    assert [bar.get_width() for bar in ax.patches] == [2 * N_TEST, 2 * N_TEST]
    for arguments in (("words",), ("words", 0), ("words", 0, 0), ("self_influence",)):
        with pytest.raises(FileNotFoundError, match="trace"):
            result.plot(*arguments)


def test_the_last_layer_has_no_words_but_all_other_charts(toy):
    result = toy.influence(loader(test_texts()), method=TracInLast())
    for arguments in (("words",), ("words", 0), ("words", 0, 0)):
        with pytest.raises(ValueError, match="no word terms"):
            result.plot(*arguments)
    for kind in ("scores", "labels", "self_influence"):
        assert result.plot(kind)[1].patches


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "pie"}, ValueError, "kind must be 'scores', 'words', 'labels' or 'self_influence', but got 'pie'"),
        ({"kind": "labels", "test_index": 0, "train_index": 1}, ValueError, "train_index goes with"),
        ({"kind": "words", "train_index": 1}, ValueError, "train_index goes with"),
        ({"kind": "self_influence", "test_index": 1}, ValueError, "leave out test_index"),
        ({"test_index": N_TEST}, IndexError, f"rows 0 to {N_TEST - 1} .*, but got {N_TEST}"),
        ({"kind": "words", "test_index": 0, "train_index": N_TRAIN}, IndexError, "training examples 0 to"),
        ({"kind": "labels", "k": 0}, ValueError, "k must be a whole number of at least 1, but got 0"),
    ],
)
def test_arguments_that_do_not_go_together(result, arguments, error, message):
    with pytest.raises(error, match=message):
        result.plot(**arguments)
    assert not pyplot.get_fignums()


def test_without_matplotlib_the_message_names_the_extra(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-tracin\[plot\]"):
        result.plot()
