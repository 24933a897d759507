"""The tables and curves of ``docs/evidence.md``, from the results that are committed; its text is left as it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.curves import draw

Tables = list[dict[str, Any]]


def main() -> None:
    """Write what stands between the page's marks, and its curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/evidence/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    options = parser.parse_args()
    text = options.page.read_text(encoding="utf-8")
    parts = {"lds": lds, "ratings": ratings, "deletion": deletion, "mislabel": mislabel, "shortlist": shortlist}
    for part, made in parts.items():
        tables = read(options.results, part)
        if tables:
            inside = "\n".join([*made(tables), *_commands(tables)])
            text = _between(text, f"<!-- {part} -->\n", f"<!-- end of {part} -->", inside)
            draw(part, tables, options.page.parent)
    options.page.write_text(text, encoding="utf-8")


def _between(text: str, start: str, end: str, inside: str) -> str:
    """A text with something else between two marks."""
    before, rest = text.split(start)
    return f"{before}{start}{inside}\n{end}{rest.split(end)[1]}"


def read(folder: Path, part: str) -> Tables:
    """The results of a part, by task."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{part}-*.json"))]


def lds(tables: Tables) -> Iterator[str]:
    """All methods on all tasks, the best on average first."""
    yield from _table(["", *(each["title"] for each in tables)], _lds_rows(tables))
    yield ""


def _lds_rows(tables: Tables) -> Iterator[list[str]]:
    yield ["halves × seeds", *(f"{each['halves']} × {each['seeds']}" for each in tables)]
    yield ["accuracy of the fit", *(f"{each['accuracy']:.3f}" for each in tables)]
    yield [
        "reliability [within]",
        *(f"{_number(each['reliability'])} [{_number(each['within_reliability'])}]" for each in tables),
    ]
    yield [
        "**highest possible** [within]",
        *(f"{_number(each['ceiling'])} [{_number(each['within_ceiling'])}]" for each in tables),
    ]
    yield ["best score against one seed, of at most", *(_against_one_seed(each) for each in tables)]
    yield ["best baseline", *(each["reference"] for each in tables)]
    found = [{row["method"]: row for row in each["rows"]} for each in tables]
    best = [max(row["lds"] for row in each["rows"]) for each in tables]

    def order(method: str) -> tuple[int, float]:
        have = [rows[method]["lds"] for rows in found if method in rows]
        return -len(have), -sum(have) / len(have)

    for method in sorted({method for rows in found for method in rows}, key=order):
        yield [method, *(_lds_cell(rows.get(method), top) for rows, top in zip(found, best, strict=True))]


def _against_one_seed(table: dict[str, Any]) -> str:
    best = table["rows"][0].get("one_seed_lds")
    if best is None or table["reliability"] is None:
        return ""
    return f"{best:.3f} of {table['reliability'] ** 0.5:.2f}"  # sqrt(r) is the ceiling of one seed


def _lds_cell(row: dict[str, Any] | None, best: float) -> str:
    if row is None:
        return ""
    value = f"{row['lds']:.3f}{'†' if row['above_reference'] > 2 * row['above_reference_se'] else ''}"
    return f"{f'**{value}**' if row['lds'] == best else value} ± {row['se_subsets']:.3f} [{row['within_lds']:.2f}]"


def ratings(tables: Tables) -> Iterator[str]:
    """A row for each method and weight of checkpoints."""
    for each in tables:
        fitted = f"**{each['title']}** (correlation of predictions {each['correlation']:.2f})"
        yield f"{fitted}: {each['halves']} halves with {_several(each['seeds'], 'seed')}; at most {each['ceiling']:.2f}"
        yield ""
        best = max(row["lds"] for row in each["rows"])
        rows = (
            [row["method"], _lds_cell(row, best), f"{row['above_reference']:+.3f} ± {row['above_reference_se']:.3f}"]
            for row in each["rows"]
        )
        yield from _table(["", "LDS ± [within]", f"above {each['reference']}"], rows)
        yield ""


def deletion(tables: Tables) -> Iterator[str]:
    """A table for each task, a row for each method and number of removed examples."""
    for each in tables:
        n, compared = len(each["tests"]), ("random, same label", "TracIn-Last")
        yield f"**{each['title']}**: {n} test examples, probability with all {each['probability_with_all']:.2f}"
        yield ""
        head = ["removed", "chosen by", "seeds", "change of p"]
        rows = (
            [str(row["k"]), row["method"], str(len(row["seeds"])), _interval(row["p"])]
            + [_against(row["against"].get(other), n) for other in compared]
            for row in each["rows"]
        )
        yield from _table([*head, *(f"p, against {other}" for other in compared)], rows)
        yield ""


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _against(pair: dict[str, Any] | None, n: int) -> str:
    return "" if pair is None else f"{_interval(pair['p'])}, lower on {pair['lower']} of {n}"


def mislabel(tables: Tables) -> Iterator[str]:
    """All tasks, a column for each ranking."""
    methods = sorted({row["method"] for each in tables for row in each["rows"]})
    yield from _table(["", *methods], ([f"{each['title']}, {each['what']}", *_found(each, methods)] for each in tables))
    yield ""


def _found(table: dict[str, Any], methods: Sequence[str]) -> Iterator[str]:
    """Of each ranking the area, and the share of wrong labels in its first tenth."""
    rows, tenth = {row["method"]: row for row in table["rows"]}, table["inspected"].index(0.1)
    for method in methods:
        row = rows.get(method)
        yield "" if row is None else f"{row['auroc']:.3f} ({row['found'][tenth]:.0%})"


def shortlist(tables: Tables) -> Iterator[str]:
    """What shortlists hold of the strongest proponents."""
    lengths = list(tables[0]["rows"][0]["recall"])
    rows = (
        [each["title"], row["method"], row["nearest_by"], *(f"{row['recall'][length]:.2f}" for length in lengths)]
        for each in tables
        for row in each["rows"]
    )
    yield from _table(["", "proponents by", "nearest by", *(f"of {length}" for length in lengths)], rows)
    yield ""


def _commands(tables: Tables) -> Iterator[str]:
    yield "Made by"
    yield "```bash"
    yield from sorted({command for each in tables for command in each["commands"]})
    yield "```"


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _several(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


if __name__ == "__main__":
    main()
