"""The table of pairs: a row for each training example that pushed a test example, the same wherever it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_tracin.gradients.printable import storable, storable_if_known
from lightning_tracin.report.explanation import Explanation
from lightning_tracin.report.rich_repr import data_frame

if TYPE_CHECKING:
    import datasets
    import pandas as pd

#: A row of the table, by the names of its columns.
Row: TypeAlias = dict[str, Any]

_TYPES = {
    "test_row": "int64",
    "test_index": "int64",
    "test_text": "string",
    "test_label": "string",
    "prediction": "string",
    "confidence": "float64",
    "target": "string",
    "role": "string",
    "rank": "int64",
    "train_index": "int64",
    "score": "float64",
    "share": "float64",
    "train_text": "string",
    "train_label": "string",
    "words": "",
}


def rows_of_pairs(explanation: Explanation) -> Iterator[Row]:
    """The rows of one test example: its proponents, then its opponents, strongest first.

    Args:
        explanation: the test example, and who pushed it.

    Yields:
        ``test_loader`` (only where there were several), ``test_row`` (row of the scores), ``test_index`` (index in its
        data set), ``test_text``, ``test_label``, ``prediction``, ``confidence``, ``target`` (what of it is explained),
        ``role`` ("proponent" or "opponent"), ``rank`` (from 1), ``train_index``, ``score``, ``share`` (of all scores of
        its sign that the test example has), ``train_text``, ``train_label``, and ``words``: the strongest of the
        training example, each with its ``word`` and ``term``. None stands for what is not known.
    """
    test = explanation.test
    of_test: Row = {} if test.loader is None else {"test_loader": storable(test.loader)}
    of_test |= {
        "test_row": explanation.row,
        "test_index": test.index,
        "test_text": storable(test.text),
        "test_label": storable_if_known(test.label),
        "prediction": storable_if_known(test.prediction),
        "confidence": test.confidence,
        "target": storable_if_known(test.explained),
    }
    for role, influentials in (("proponent", explanation.proponents), ("opponent", explanation.opponents)):
        for rank, each in enumerate(influentials, start=1):
            yield of_test | {
                "role": role,
                "rank": rank,
                "train_index": each.example.index,
                "score": each.score,
                "share": each.share,
                "train_text": storable(each.example.text),
                "train_label": storable_if_known(each.example.label),
                "words": [{"word": storable(word), "term": term} for word, term in each.strongest_words()],
            }


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The names of the columns of a table, also of one without rows."""
    return list(rows[0]) if rows else list(_TYPES)


def table_of_pairs(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a pandas table.

    Raises:
        ModuleNotFoundError: without pandas.
    """
    return data_frame(rows, columns_of(rows))


def words_in_a_line(words: Iterable[Row]) -> str:
    """The words of a row for tables whose cells hold no lists.

    Example:
        >>> words_in_a_line([{"word": "tariff", "term": 0.0123}, {"word": "the", "term": -4e-4}])
        'tariff +0.0123, the -0.0004'
    """
    return ", ".join(f"{each['word']} {each['term']:+.3g}" for each in words)


def dataset_of_pairs(rows: Sequence[Row]) -> datasets.Dataset:
    """Rows as a data set of Hugging Face.

    Raises:
        ModuleNotFoundError: without the package.
    """
    try:
        from datasets import Dataset, Features, Value
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_dataset needs datasets: pip install lightning-tracin[datasets]") from error
    words = [{"word": Value("string"), "term": Value("float64")}]
    types = {"test_loader": "string"} | _TYPES
    names = columns_of(rows)
    features = Features({name: words if name == "words" else Value(types[name]) for name in names})
    columns = {name: [row[name] for row in rows] for name in names}
    return Dataset.from_dict(columns, features=features)
