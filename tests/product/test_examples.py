"""The examples at their small settings: each finds what its story tells, more often than chance."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import transformers
from lightning_utilities.core import rank_zero
from nbclient import NotebookClient

from examples import label_review, reweighting, sentiment, spam, topics

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def loudness():
    """What the examples silence is heard again by the tests that follow."""
    level, verbosity = rank_zero.log.level, transformers.logging.get_verbosity()
    yield
    rank_zero.log.setLevel(level)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.mark.slow
def test_flipped_labels_are_found_more_often_than_by_chance(tmp_path):
    figures = topics.main(["--small", "--output", str(tmp_path), "--pictures", str(tmp_path / "pictures")])
    assert figures["accuracy"] > 0.4  # by chance: 0.2
    assert max(figures["found_in_top_tenth"].values()) >= 0.3  # by chance: 0.1
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {f"terminal-{width}-{scheme}.svg" for width in (80, 120) for scheme in ("light", "dark")}
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_planted_word_is_the_first_of_the_table_and_the_cause(tmp_path):
    figures = spam.main(["--small", "--output", str(tmp_path)])
    assert figures["found"].lower() == spam.OPENING.lower()
    as_they_are, without_it, without_another, trained_without, trained_without_random = figures["taken_for_spam"]
    assert as_they_are > 66 / 2  # of all ham messages that were opened so
    assert without_it < as_they_are / 2 < without_another
    assert trained_without < as_they_are / 2 < trained_without_random
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.slow
def test_mistakes_fade_without_their_proponents_and_not_without_random_examples(tmp_path):
    figures = sentiment.main(["--small", "--output", str(tmp_path)])
    before, without_proponents, without_random = figures["sure"]
    assert before - without_proponents > 2 * abs(before - without_random)
    assert figures["changed"][1] > figures["changed"][2]
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.slow
def test_reviewing_label_issues_finds_flipped_labels_and_helps(tmp_path):
    figures = label_review.main(["--small", "--output", str(tmp_path)])
    for found in figures["found"]:
        assert found["among the reviewed"] > 0.6 * found["flipped"]  # by chance: 0.25
    before, _, reviewed, clean = map(sum, zip(*figures["accuracies"], strict=True))
    assert before < reviewed
    assert before < clean
    assert (tmp_path / "reviewed.csv").exists()


@pytest.mark.slow
def test_flipped_labels_have_less_influence_on_trusted_examples(tmp_path):
    figures = reweighting.main(["--seeds", "2", "--output", str(tmp_path)])
    assert min(figures["aurocs"]) > 0.6  # by chance: 0.5
    before, _, trusted, _, clean = map(sum, zip(*figures["accuracies"], strict=True))
    assert before < trusted
    assert before < clean


def executed(name, monkeypatch):
    """The outputs of a notebook that a clean kernel has run, and what it printed; its words add up to its score."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    terms = {what.strip(): float(value) for what, value in re.findall(r"(.+) ([+-]\d\.\d\de[+-]\d\d)", printed)}
    assert terms["all words"] == pytest.approx(terms["score"], rel=0.02)
    return outputs, printed


@pytest.mark.slow
def test_flipped_labels_are_found_and_shown_word_by_word(monkeypatch):
    outputs, printed = executed("labels", monkeypatch)
    found, flipped = map(int, re.search(r"(\d+) of (\d+) flipped labels", printed).groups())
    assert found >= flipped / 2  # by chance: a tenth
    assert any("labels are probably wrong" in output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
def test_a_text_from_production_is_explained(monkeypatch):
    _, printed = executed("production", monkeypatch)
    assert "target tech, not business" in printed
    assert "prediction | tech |" in printed


@pytest.mark.slow
def test_the_tour_runs_from_a_clean_kernel(monkeypatch):
    outputs, _ = executed("words", monkeypatch)
    assert any("Words by their influence on 32" in output.get("data", {}).get("text/plain", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
