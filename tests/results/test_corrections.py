"""A reviewed table of label issues, back in a data set of any kind."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from lightning_tracin import apply_corrections

NAMES = ("sport", "=tech", "arts")
LABELS = [0, 1, 2, 1, 0]
CORRECTED = {1: "arts", 4: "=tech"}


def table(corrected=CORRECTED, names=NAMES):
    """As a person has filled it in."""
    return [
        {"train_index": index, "given_label": names[label], "corrected_label": corrected.get(index), "text": "x"}
        for index, label in enumerate(LABELS)
    ]


def written(path, rows, delimiter=",", mark=""):
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def expected(drop=()):
    right = [2 if index == 1 else 1 if index == 4 else label for index, label in enumerate(LABELS)]
    return [label for index, label in enumerate(right) if index not in drop]


class Stream(IterableDataset):
    def __iter__(self):
        yield from LABELS


DATASETS = {
    "dicts": (
        [{"text": f"t{index}", "label": label} for index, label in enumerate(LABELS)],
        lambda item: item["label"],
    ),
    "named labels": ([{"labels": NAMES[label]} for label in LABELS], lambda item: NAMES.index(item["labels"])),
    "pairs": ([(f"t{index}", label) for index, label in enumerate(LABELS)], lambda item: item[1]),
    "tensors": (TensorDataset(torch.arange(5), torch.tensor(LABELS)), lambda item: int(item[1])),
    "columns": (TensorDataset(torch.arange(5), torch.tensor(LABELS)[:, None].float()), lambda item: int(item[1])),
    "lists of one": ([{"labels": [float(label)]} for label in LABELS], lambda item: int(item["labels"][0])),
    "numpy": ([{"x": 1, "labels": np.int32(label)} for label in LABELS], lambda item: int(item["labels"])),
    "lists of three": ([[label, "a", "b"] for label in LABELS], lambda item: item[0]),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_labels_are_corrected_and_the_data_set_that_was_passed_stays(kind):
    dataset, label_of = DATASETS[kind]
    before = repr([dataset[index] for index in range(5)])
    where = 0 if kind == "lists of three" else None
    found = apply_corrections(dataset, table(), names=NAMES, label=where)
    assert [label_of(found[index]) for index in range(len(found))] == expected()
    assert isinstance(found, list) == isinstance(dataset, list)
    for index in range(5):
        assert type(found[index]) is type(dataset[index])
    assert repr([dataset[index] for index in range(5)]) == before


@pytest.mark.parametrize(("delimiter", "mark"), [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_files_of_any_spreadsheet_are_read(tmp_path, delimiter, mark):
    rows = table({1: "arts", 4: "'=tech", 0: "drop"}, ("sport", "'=tech", "arts"))  # as cells of a spreadsheet
    path = written(tmp_path / "review.csv", rows, delimiter, mark)
    dataset, label_of = DATASETS["dicts"]
    found = apply_corrections(dataset, path, names=NAMES)
    assert [label_of(item) for item in found] == expected(drop=(0,))
    assert [item["text"] for item in found] == ["t1", "t2", "t3", "t4"]


def test_numbers_stand_for_themselves_as_pandas_writes_them():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table({1: 2.0, 4: 1.0}, ("0", "1", "2")))
    assert [label for _, label in apply_corrections(DATASETS["pairs"][0], frame.to_dict("records"))] == expected()


def test_a_data_set_of_hugging_face_stays_one():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(NAMES))})
    dataset = datasets.Dataset.from_list(DATASETS["dicts"][0], features=features)
    found = apply_corrections(dataset, table({**CORRECTED, 2: "drop"}))
    assert found.features == features
    assert found["label"][:] == expected(drop=(2,))
    assert dataset["label"][:] == LABELS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given_label": "arts"}, r"example 1 has the label 'arts', but in this data set it has 1: .* another order"),
        ({"corrected_label": "sprot"}, r"'sprot' of example 1 is none of those known: =tech, arts, sport"),
        ({"corrected_label": "7"}, "'7' of example 1 is none of those known"),
        ({"corrected_label": "nan"}, "'nan' of example 1 is none of those known"),
        ({"train_index": 5}, "train_index must be a number from 0 to 4, the data set's last, but got '5'"),
        ({"train_index": -1}, "but got '-1'"),
        ({"train_index": 2}, "Example 2 stands in the table 2 times"),
    ],
)
def test_a_table_that_does_not_fit_changes_nothing(change, message):
    rows = table()
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        apply_corrections(DATASETS["dicts"][0], rows, names=NAMES)


def test_what_cannot_be_corrected_is_told(tmp_path):
    with pytest.raises(ValueError, match="lacks the columns given_label, corrected_label"):
        apply_corrections(DATASETS["dicts"][0], written(tmp_path / "a.csv", [{"train_index": 1}]))
    with pytest.raises(FileNotFoundError):
        apply_corrections(DATASETS["dicts"][0], tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"a mapping with text: say where its label is, as label=\.\.\., got None"):
        apply_corrections([{"text": "a"}], table())
    with pytest.raises(ValueError, match="The data set is empty"):
        apply_corrections([], table())
    with pytest.raises(ValueError, match=r"names=\.\.\. if the table has names of numbers"):
        apply_corrections(DATASETS["pairs"][0], table())
    with pytest.raises(ValueError, match="label of example 0 is a list, but only single labels"):
        apply_corrections([{"label": [0, 1]}] * 5, table())
    with pytest.raises(TypeError, match="needs a data set with a length and an index, but got Stream"):
        apply_corrections(Stream(), table())


def test_a_label_that_is_called_drop_is_a_label():
    dataset = [{"label": label} for label in ("drop", "keep")]
    rows = [{"train_index": 1, "given_label": "keep", "corrected_label": "drop"}]
    assert apply_corrections(dataset, rows, names=("drop", "keep")) == [{"label": "drop"}] * 2


@pytest.mark.parametrize("form", [tuple, list])
def test_a_place_from_the_end_is_that_of_the_label(form):
    dataset = [form(["a", "x", 0]), form(["b", "y", 1])]
    rows = [{"train_index": 0, "given_label": "0", "corrected_label": "1"}]
    assert apply_corrections(dataset, rows, label=-1) == [form(["a", "x", 1]), form(["b", "y", 1])]
    with pytest.raises(ValueError, match=rf"is a {form.__name__}: say where its label is, as label=\.\.\., got -4"):
        apply_corrections(dataset, rows, label=-4)


def corrected_labels(labels, corrected, names=None):
    """The labels of a data set with those that a table of the changed rows corrects."""
    name = dict(enumerate(names or ()))
    rows = [
        {"train_index": index, "given_label": name.get(labels[index], labels[index]), "corrected_label": text}
        for index, text in corrected.items()
    ]
    return [item["label"] for item in apply_corrections([{"label": each} for each in labels], rows, names=names)]


def test_names_that_are_digits_are_names_as_pandas_writes_them():
    names = ["1", "2", "3", "4", "5"]
    assert corrected_labels([0, 1, 2], {0: 2.0, 2: 5.0}, names) == [1, 1, 4]
    assert corrected_labels([0, 1, 2], {0: "2", 2: "5"}, names) == [1, 1, 4]
    assert corrected_labels(["1", "2"], {0: 2.0}) == ["2", "2"]
    rows = [{"train_index": 0, "given_label": 2.0, "corrected_label": 1.0}]
    assert apply_corrections([{"label": 1}], rows, names=names) == [{"label": 0}]
    with pytest.raises(ValueError, match="has the label '1', but in this data set it has 1"):
        apply_corrections([{"label": 1}], [rows[0] | {"given_label": "1"}], names=names)  # that is the name of 0


@pytest.mark.parametrize(
    ("label", "kind"), [(np.array(["cat"]), np.ndarray), (np.array("cat"), np.ndarray), (np.str_("cat"), np.str_)]
)
def test_texts_of_numpy_are_not_cut(label, kind):
    dataset = [{"label": label}, {"label": np.str_("elephant")}]
    rows = [{"train_index": 0, "given_label": "cat", "corrected_label": "elephant"}]
    found = apply_corrections(dataset, rows)[0]["label"]
    assert found == "elephant"
    assert type(found) is kind
    assert found.shape == label.shape


@pytest.mark.parametrize(
    "label",
    [np.uint8(0), np.array([0], dtype=np.uint8), torch.tensor(0, dtype=torch.uint8), torch.tensor([0]).bool(), False],
)
def test_a_number_that_the_labels_cannot_hold_is_refused(label):
    with pytest.raises(ValueError, match=r"corrected label 300 of example 0 does not fit into the .*(int8|bool)"):
        apply_corrections([{"label": label}], [{"train_index": 0, "given_label": "0", "corrected_label": "300"}])


def test_values_are_corrected_in_the_precision_of_the_labels():
    labels = [torch.tensor(1.25), torch.tensor(2.0).half(), 3.5]
    rows = [
        {"train_index": index, "given_label": float(labels[index]), "corrected_label": text}
        for index, text in enumerate(["-.1", "0.3", "1e1"])
    ]
    assert [label for _, label in apply_corrections([("x", label) for label in labels], rows)] == [
        torch.tensor(-0.1),
        torch.tensor(0.3).half(),
        10.0,
    ]
    assert corrected_labels([1, 2.5], {1: 2}) == [1, 2.0]
    with pytest.raises(ValueError, match=r"corrected label 1.5 of example 0 does not fit into the int"):
        corrected_labels([1, 2.5], {0: "1.5"})


def test_a_class_that_is_called_drop_is_known_though_no_row_has_it():
    assert corrected_labels(["keep", "drop", "keep"], {0: "drop"}) == ["drop", "drop", "keep"]
    assert corrected_labels(["keep", "other", "keep"], {0: "drop", 2: "other"}) == ["other", "other"]


@pytest.mark.parametrize("text", ["-100", "1_0", "-1", "2.5", "inf"])
def test_numbers_that_are_no_classes_are_refused(text):
    with pytest.raises(ValueError, match=f"'{text}' of example 0 is none of those known: 0, 1"):
        corrected_labels([0, 1], {0: text})


def test_numbers_of_the_data_set_and_of_new_classes_are_classes():
    assert corrected_labels([1, -1, 1], {0: "-1", 2: "7"}) == [-1, -1, 7]


def test_names_of_two_numbers_are_refused():
    with pytest.raises(ValueError, match="names has 'b' 2 times"):
        corrected_labels([0, 1, 2], {0: "b"}, ["a", "b", "b"])


def test_rows_of_a_tensor_stay_as_they_were():
    dataset = [torch.tensor([5.0, 6.0, 0.0]), torch.tensor([5.0, 7.0, 1.0])]
    found = apply_corrections(dataset, [{"train_index": 0, "given_label": "0", "corrected_label": "1"}], label=2)
    assert found[0].tolist() == [5.0, 6.0, 1.0]
    assert dataset[0].tolist() == [5.0, 6.0, 0.0]


def test_long_texts_are_read(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"train_index": 0, "given_label": 0, "corrected_label": 1, "text": "x" * 200_000}]
    assert apply_corrections([("a", 0)], written(tmp_path / "long.csv", rows)) == [("a", 1)]
    assert csv.field_size_limit() == limit
