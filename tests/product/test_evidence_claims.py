"""What the documentation says of the study's results is what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/evidence/results"
TRUST = (ROOT / "docs/trust.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

LDS = {
    "BBC CNN": "bbc-cnn",
    "SMS CNN": "sms-cnn",
    "R8 CNN": "r8-cnn",
    "movies MiniLM": "movies-minilm",
    "PrivacyQA MiniLM": "privacy-minilm",
}
DELETION = {
    "BBC News, CNN": "bbc-cnn",
    "SMS, CNN": "sms-cnn",
    "R8, CNN": "r8-cnn",
    "movie reviews, MiniLM": "movies-minilm",
    "BBC News, MiniLM": "bbc-minilm",
}
METHODS = {
    "ridge of words and K-FAC layers (R2)": "R2: ridge, words and K-FAC layers",
    "the same without common words": "R2, no common words",
    "words and K-FAC layers (R1)": "R1: words and K-FAC layers",
    "K-FAC layers": "K-FAC layers, residual",
    '`TracInWE(normalize="cosine", weights="residual")`': "WE cosine, residual",
    "`TracInWE()`": "TracIn-WE",
    "`TracInLast()`": "TracIn-Last",
    "random, same label": "random, same label",
}


def table(heads, n_rows=7):
    """The rows of a page's table with these columns, by their first cell: as many as that, or more."""
    lines = TRUST.splitlines()
    head = next(
        at for at, line in enumerate(lines) if all(f"| {each} |" in line.replace(" | ", " | ") for each in heads)
    )
    rows = {}
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            assert len(rows) >= n_rows
            return rows
        name, *cells = (each.strip() for each in line.strip("|").split("|"))
        rows[name] = dict(zip(heads, cells, strict=True))
    return rows


def results(part, task):
    return json.loads((RESULTS / f"{part}-{task}.json").read_text(encoding="utf-8"))


def numbers(text):
    """Those of a cell, without the zero before the point that the page leaves out."""
    return [float(each) for each in re.findall(r"-?\d*\.\d+", text)]


@pytest.mark.parametrize(("head", "task"), LDS.items())
def test_the_lds_that_is_named_is_that_of_the_results(head, task):
    found = results("lds", task)
    by_name = {row["method"]: row for row in found["rows"]} | {"best baseline": {}}
    by_name["best baseline"] = by_name[found["reference"]]
    for name, cells in table(LDS).items():
        said = numbers(cells[head])
        if not said and name == "the same without common words":
            assert "R2, no common words" not in by_name, task
            continue
        row = by_name[METHODS.get(name, name)]
        assert said, name
        assert said == pytest.approx([row["lds"], row["se_subsets"]][: len(said)], abs=6e-4), name


@pytest.mark.parametrize(("head", "task"), DELETION.items())
def test_the_case_deletion_that_is_named_is_that_of_the_results(head, task):
    found = {row["method"]: row for row in results("deletion", task)["rows"] if row["k"] == 50}
    for name, cells in table(DELETION).items():
        cell = cells[head]
        if name == "seeds of each fit":
            assert int(cell) == len(found["TracIn-WE"]["seeds"])
        elif name == "`TracInWE` against `TracInLast`":
            pair = found["TracIn-WE"]["against"]["TracIn-Last"]
            assert numbers(cell) == pytest.approx(pair["p"], abs=6e-3)
            assert f"lower on {pair['lower']} of 20" in cell
        elif cell:
            assert numbers(cell) == pytest.approx(found[METHODS[name]]["p"], abs=6e-3), name


@pytest.mark.parametrize(("head", "task"), [("BBC News", "bbc-cnn"), ("SMS", "sms-cnn")])
def test_what_any_number_of_removed_examples_does_is_that_of_the_results(head, task):
    found = {(row["k"], row["method"].split(":")[0]): row for row in results("deletion", task)["rows"]}
    methods = {"`TracInWE()`": "TracIn-WE", "`TracInLast()`": "TracIn-Last", "R2": "R2"}
    heads = [f"{each}, {name}" for each in ("BBC News", "SMS") for name in methods]
    for k, cells in table(heads, n_rows=4).items():
        for name, method in methods.items():
            cell, row = cells[f"{head}, {name}"], found.get((int(k), method))
            assert (row is None) == (cell == ""), (k, name)
            if row is not None:
                assert numbers(cell) == pytest.approx(row["p"], abs=6e-3), (k, name)
                n_seeds = re.search(r"\((\d) seeds?\)", cell)
                assert len(row["seeds"]) == (5 if n_seeds is None else int(n_seeds[1])), (k, name)


def test_the_ridge_is_above_every_baseline_by_five_standard_errors():
    for task in LDS.values():
        found = results("lds", task)
        ridge = next(row for row in found["rows"] if row["method"].startswith("R2:"))
        assert ridge["above_reference"] > 5 * ridge["above_reference_se"], task
    assert "above every baseline on five sets, by 5 standard errors and more" in README


def test_what_is_said_of_ratings_is_that_of_the_results():
    rows = {row["method"]: row["lds"] for row in results("ratings", "cnn")["rows"]}
    cosines = [rows[f"TracIn-WE, cosine, residual{end}"] for end in (", no common words", "")]
    said = re.search(r"words reach (\S+), with them (\S+), TF-IDF\s+times the agreement of ratings (\S+)", TRUST)
    assert [float(each) for each in said.groups()] == pytest.approx([*cosines, rows["TF-IDF x agreement"]], abs=6e-4)
    assert max(rows, key=rows.get) == "ridge, residual, no common words"


def test_what_is_said_to_have_lost_has_lost():
    """Below TF-IDF times labels wherever it was run; EK-FAC and Inf-Last but on PrivacyQA."""
    lost = ("representer points", "TrackStar's recipe", "UnTrac-Inv, lr 5e-5", "UnTrac-Inv, lr 1e-3")
    for task in LDS.values():
        lds = {row["method"]: row["lds"] for row in results("lds", task)["rows"]}
        words = max(lds[f"TF-IDF x label (1, {other})"] for other in (0, -1))
        behind = lost if task == "privacy-minilm" else (*lost, "kronfluence EK-FAC", "Inf-Last")
        assert all(lds[each] < words for each in behind if each in lds), task
