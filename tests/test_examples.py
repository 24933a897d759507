"""The examples at their small settings: each finds what its story tells, more often than chance."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from examples import sentiment, spam, topics

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _warnings_and_random_state_of_others():
    with torch.random.fork_rng():
        yield


def test_flipped_labels_are_found_more_often_than_by_chance(tmp_path):
    figures = topics.main(["--small", "--output", str(tmp_path)])
    assert figures["accuracy"] > 0.6
    assert max(figures["found_in_top_tenth"].values()) >= 0.3  # by chance: 0.1
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_the_planted_word_is_the_first_of_the_table_and_the_cause(tmp_path):
    figures = spam.main(["--small", "--output", str(tmp_path)])
    assert figures["found"].lower() == spam.SIGNED.lower()
    as_they_are, without_it, without_another, trained_without, trained_without_random = figures["taken_for_spam"]
    assert as_they_are >= 20
    assert without_it < without_another
    assert trained_without < trained_without_random
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_mistakes_fade_without_their_proponents_and_not_without_random_examples(tmp_path):
    sure = sentiment.main(["--small", "--output", str(tmp_path)])["sure"]
    assert sure["before"] - sure["without"] > 2 * abs(sure["before"] - sure["at_random"])
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_the_notebook_runs_from_a_clean_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(FOLDER / "words.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "proponents" in printed.lower()
