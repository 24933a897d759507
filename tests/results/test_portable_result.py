"""A saved result opened where its trace is not: it shows what it showed, and says what it cannot."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib

import pytest
import torch
from pages import data_of
from safetensors import safe_open
from safetensors.torch import save_file
from spellings import TEXTS, trained
from stored_files import truncated
from toy import Toy, fitted, loader, test_texts, texts

from lightning_tracin import InfluenceResult, TracInLast, TracInSum, TracInWE
from lightning_tracin.cli.command import main
from lightning_tracin.storage.files import hash_of_tensors, read_json, write_json
from lightning_tracin.storage.own_files import mark_removed

K = 3

ASKED = {
    "all scores": {},
    "k": {"k": 8},
    "last layer": {"method": TracInLast()},
    "cosine": {"method": TracInWE(normalize="cosine", exclude_tokens=[3])},
    "sum": {"method": TracInSum((TracInWE(), TracInLast()))},
}


@pytest.fixture(scope="module", params=ASKED)
def opened(request, tmp_path_factory):
    """A result, and what is loaded from its file in a folder with nothing else."""
    folder = tmp_path_factory.mktemp("project")
    trace = fitted(folder / "trace", trainer={"max_epochs": 1})
    result = trace.influence(loader(test_texts()), **ASKED[request.param])
    path = tmp_path_factory.mktemp("empty") / "result.safetensors"
    shutil.move(result.save(folder / "result.safetensors", k=K), path)
    shutil.move(folder / "trace", folder / "away")
    loaded = InfluenceResult.load(path)
    assert loaded.trace is None
    shutil.move(folder / "away", folder / "trace")
    return result, loaded


def without_notes(shown):
    return re.sub(r"Shown without the trace:.*?larger k\.\n", "", shown, flags=re.S)


def test_it_prints_what_it_printed(opened, capsys):
    before, after = opened
    assert without_notes(str(after)) == str(before)
    assert "Shown without the trace" in str(after)
    before.show(4, k=K)
    shown = capsys.readouterr().out
    after.show(4, k=K)
    assert capsys.readouterr().out == shown


def test_its_tables_are_the_same(opened):
    before, after = opened
    assert after.rows(K) == before.rows(K)
    assert list(after.explanations(k=2)) == list(before.explanations(k=2))
    assert after.label_issues().rows() == before.label_issues().rows()
    assert str(after.label_issues(n=3)) == str(before.label_issues(n=3))


def test_its_page_has_the_same_data(opened, tmp_path):
    pages = [each.to_html(tmp_path / "page.html", k=K).read_text() for each in opened]
    assert data_of(pages[0]) == data_of(pages[1])


def test_words_of_what_is_listed_and_the_first_of_the_word_table(opened):
    before, after = opened
    if not before._has_words:
        with pytest.raises(ValueError, match="no word terms"):
            after.words(0, 0)
        return
    (explanation,) = before.explanations([2], k=K)
    for each in explanation.opponents:
        assert after.words(2, each.example.index) == before.words(2, each.example.index)
    for n in (1, 7, 50):
        mine, its = after.word_table(n), before.word_table(n)
        assert (mine.words, mine.classes, mine.labels, mine.n_left) == (its.words, its.classes, its.labels, its.n_left)
        assert torch.equal(mine.values, its.values)
        assert mine.to_pandas().equals(its.to_pandas())
    with pytest.raises(FileNotFoundError, match=r"holds the \d+ strongest words alone: ask word_table for at most"):
        after.word_table(min_examples=2)


def test_it_draws(opened):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for kind, row in [("scores", 1), ("labels", None), *([("words", 1)] if opened[0]._has_words else [])]:
        before, after = (each.plot(kind, row, k=K)[1] for each in opened)
        assert after.get_title(loc="left") == before.get_title(loc="left")
        assert [bar.get_bbox().bounds for bar in after.patches] == [bar.get_bbox().bounds for bar in before.patches]
        pyplot.close("all")


def test_it_is_saved_again(opened, tmp_path):
    before, after = opened
    again = InfluenceResult.load(after.save(tmp_path / "again.safetensors"))
    assert again.rows(K) == before.rows(K)


def test_beyond_what_is_held_scores_are_left(opened):
    before, after = opened
    expected = max(before.explanations(k=8), key=lambda each: len(each.proponents))
    (explanation,) = after.explanations([expected.row], k=8)
    assert [each.score for each in explanation.proponents] == [each.score for each in expected.proponents]
    assert len(explanation.proponents) > K
    assert explanation.proponents[-1].terms == ()
    if before._has_words:
        beyond = explanation.proponents[-1].example.index
        with pytest.raises(FileNotFoundError, match=r"holds the words and texts of the \d+ strongest of each side"):
            after.words(expected.row, beyond)
    with pytest.raises(FileNotFoundError, match=r"self-influence by TracIn-.*, alone\. Load the result"):
        after.label_issues(TracInLast(normalize="train"))


def test_with_its_trace_a_loaded_result_goes_beyond_the_file(toy, tmp_path):
    result = toy.influence(loader(test_texts()))
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors", k=1))
    assert loaded.rows(9) == result.rows(9)
    assert loaded.words(1, int(result.proponents(9).indices[1, 8])) == result.words(
        1, int(result.proponents(9).indices[1, 8])
    )


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """A result of texts that are known as they were written, from a file in an empty folder, and their tokenizer."""
    tokenizer, folder = trained("WordPiece"), tmp_path_factory.mktemp("spelled")
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    data = torch.utils.data.TensorDataset(ids, torch.arange(len(rows)) % 3)

    class Reading(Toy):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(len(tokenizer), 8, padding_idx=tokenizer.pad_token_id)
            self.tokenizer = tokenizer

    fit = fitted(folder / "trace", Reading(), loader(data, shuffle=True), trainer={"max_epochs": 1})
    result = fit.influence(loader(torch.utils.data.Subset(data, range(4)))).with_texts(train=TEXTS, test=TEXTS[:4])
    path = result.save(folder / "result.safetensors")
    shown = [str(result), result.rows(3)]
    shutil.rmtree(folder / "trace")
    return shown, InfluenceResult.load(path), tokenizer


def test_texts_as_they_were_written_travel_along(spelled):
    (printed, rows), loaded, _ = spelled
    assert loaded.rows(3) == rows
    assert {row["test_text"] for row in rows} == {text.strip() for text in TEXTS[:4]}
    assert without_notes(str(loaded)) == printed


def test_texts_may_be_given_anew(spelled):
    _, loaded, tokenizer = spelled
    again = loaded.with_texts(train=[text.upper() for text in TEXTS], tokenizer=tokenizer)
    by_index = {row["train_index"]: row["train_text"] for row in again.rows(3)}
    assert by_index
    assert all(text == text.upper() for text in by_index.values())


def test_the_command_line_needs_no_trace(opened, tmp_path, capsys):
    before, after = opened
    path = str(after.save(tmp_path / "result.safetensors"))
    assert main(["export", path, "--json", "-", "-k", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == before.rows(2)
    assert main(["top", path, "--test", "1", "-k", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split("\t")[7] for line in printed.out.splitlines()] == [
        row["train_text"] for row in before.rows(2) if row["test_index"] == 1
    ]


def test_a_data_set_of_hugging_face(toy):
    datasets = pytest.importorskip("datasets")
    result = toy.influence(loader(test_texts()))
    found = result.to_dataset(3)
    assert isinstance(found, datasets.Dataset)
    assert found.to_list() == result.rows(3)
    assert found.features["words"].feature == {"word": datasets.Value("string"), "term": datasets.Value("float64")}


def test_a_data_set_without_the_package_names_the_extra(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-tracin\[datasets\]"):
        toy.influence(loader(test_texts())).to_dataset()


def test_scores_alone_take_no_more_than_they_did(toy, tmp_path):
    result = toy.influence(loader(test_texts()))
    sizes = [result.save(tmp_path / f"{k}.safetensors", k=k).stat().st_size for k in (0, 2, 20)]
    assert sizes == sorted(sizes)
    assert InfluenceResult.load(tmp_path / "0.safetensors").excerpt is None
    with pytest.raises(ValueError, match="k must be a whole number of at least 0, but got -1"):
        result.save(tmp_path / "result.safetensors", k=-1)


# What a stranger may have made

HEADER, CHECKSUM = "lightning_tracin.result", "lightning_tracin.checksum"


def forged(path, change_tensors=None, change_header=None):
    with safe_open(path, framework="pt") as opened_file:
        tensors = {name: opened_file.get_tensor(name).clone() for name in opened_file.keys()}  # noqa: SIM118
        header = json.loads(opened_file.metadata()[HEADER])
    if change_tensors is not None:
        change_tensors(tensors)
    if change_header is not None:
        change_header(header["excerpt"])
    text = json.dumps({**header, "trace": None, "trace_relative": None})
    resaved(tensors, path, text)


def resaved(tensors, path, text):
    save_file(tensors, path, metadata={HEADER: text, CHECKSUM: hash_of_tensors(tensors, text)})


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    return toy.influence(loader(test_texts())).save(tmp_path_factory.mktemp("saved") / "result.safetensors", k=3)


@pytest.fixture
def file(saved, tmp_path):
    """A copy, to be forged."""
    return shutil.copy(saved, tmp_path / "result.safetensors")


def set_in(name, place, value):
    def change(tensors):
        tensors[f"excerpt.{name}"].view(-1)[place] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_in("train.offsets", 1, -1),
        set_in("train.offsets", -1, 2**40),
        set_in("tests.offsets", 1, 2**40),
        set_in("train.indices", 0, 20),
        set_in("train.indices", 0, 7),
        set_in("terms.first", 1, 10**6),
        set_in("terms.offsets", 1, -4),
        set_in("terms.indices", 0, 25),
        set_in("terms.indices", 1, 0),
        set_in("terms.tokens", 0, -1),
        set_in("terms.values", 0, float("nan")),
        set_in("review.self_influence", 0, float("inf")),
        set_in("review.scores", 0, 1.5),
        set_in("review.given", 0, float("inf")),
        set_in("word_table.values", 0, float("nan")),
        set_in("word_table.examples", 0, -1),
        lambda tensors: tensors.pop("excerpt.review.scores"),
        lambda tensors: tensors.update({"excerpt.more": torch.zeros(1)}),
        lambda tensors: tensors.update({"excerpt.tests.content": torch.zeros(0, dtype=torch.uint8)}),
    ],
)
def test_forged_tensors_are_refused(file, change):
    forged(file, change)
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        InfluenceResult.load(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k", 0),
        ("n_train", 10**9),
        ("n_train", 3),
        ("has_terms", False),
        ("review_method", {"method": "None"}),
        ("word_table", None),
        ("word_table", {"words": ["a"], "special": [], "classes": [], "labels": [], "n_left": 0}),
        ("notes", "note"),
        ("more", 1),
    ],
)
def test_forged_headers_are_refused(file, key, value):
    forged(file, change_header=lambda header: header.update({key: value}))
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        InfluenceResult.load(file)


GOOD = {"index": 0, "words": [{"text": "a", "before": "", "places": [0]}], "label": None, "ids": [7]}


def test_a_folder_is_no_result_and_a_trace_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"A result is one file, but .* is a folder\.$"):
        InfluenceResult.load(tmp_path)
    fitted(tmp_path / "trace")
    with pytest.raises(ValueError, match="is a folder, a trace: Trace opens it, and "):
        InfluenceResult.load(tmp_path / "trace")


@pytest.mark.parametrize(
    "content",
    [
        b"not compressed",
        zlib.compress(b"{"),
        zlib.compress(b"[]"),
        zlib.compress(json.dumps({**GOOD, "index": 1}).encode()),
        zlib.compress(json.dumps({**GOOD, "label": 3}).encode()),
        zlib.compress(json.dumps({**GOOD, "ids": []}).encode()),
        zlib.compress(json.dumps({**GOOD, "ids": [-1]}).encode()),
        zlib.compress(json.dumps({**GOOD, "confidence": 1e300}).encode()),
        zlib.compress(json.dumps({**GOOD, "words": [{"text": "a", "before": "", "places": [-1]}]}).encode()),
        zlib.compress(json.dumps(GOOD).encode()) + b"more",
        zlib.compress(json.dumps(GOOD).encode())[:-3],
        zlib.compress(b"[" * 10**5),
        zlib.compress(b" " * (80 * 2**20)),  # a few kilobytes that would unfold into as many megabytes
    ],
    ids=range(13),
)
def test_forged_examples_are_refused_when_they_are_read(file, content):
    def change(tensors):
        offsets, old = tensors["excerpt.tests.offsets"], tensors["excerpt.tests.content"]
        rest = old[int(offsets[1]) :]
        tensors["excerpt.tests.content"] = torch.cat([torch.tensor([*content], dtype=torch.uint8), rest])
        tensors["excerpt.tests.offsets"] = torch.cat([offsets[:1], offsets[1:] - offsets[1] + len(content)])

    forged(file, change)
    loaded = InfluenceResult.load(file)
    with pytest.raises(ValueError, match=f"{file} is damaged: "):
        str(loaded)
    assert list(loaded.explanations([1]))


def test_what_is_forged_well_is_read(file):
    def change(tensors):
        offsets, old = tensors["excerpt.tests.offsets"], tensors["excerpt.tests.content"]
        content = zlib.compress(json.dumps({**GOOD, "added_later": 1}).encode())
        tensors["excerpt.tests.content"] = torch.cat([torch.tensor([*content], dtype=torch.uint8), old[offsets[1] :]])
        tensors["excerpt.tests.offsets"] = torch.cat([offsets[:1], offsets[1:] - offsets[1] + len(content)])

    forged(file, change)
    assert next(InfluenceResult.load(file).explanations([0])).test.text == "a"


def test_labels_are_reviewed_without_a_trace_of_texts(toy):
    issues = toy.influence(loader(test_texts())).label_issues()
    by_index = {issue.example.index: issue.example for issue in issues.issues}
    for index, (ids, label) in enumerate(zip(*texts().tensors, strict=True)):
        assert by_index[index].text == " ".join(str(token) for token in ids.tolist() if token)
        assert by_index[index].label == str(int(label))
    assert len(issues) == len(by_index)


def test_a_file_that_was_written_before_is_read(toy, tmp_path):
    path = toy.influence(loader(test_texts())).save(tmp_path / "result.safetensors", k=0)
    with safe_open(path, framework="pt") as opened_file:
        tensors = {name: opened_file.get_tensor(name).clone() for name in opened_file.keys()}  # noqa: SIM118
        header = json.loads(opened_file.metadata()[HEADER])
    assert header.pop("excerpt") is None
    assert header.pop("target") == "label"
    resaved(tensors, path, json.dumps(header))
    assert InfluenceResult.load(path).rows(2) == toy.influence(loader(test_texts())).rows(2)


def checkpoint_file(trace):
    return sorted(trace.glob("checkpoints/*/checkpoint.json"))[-1]


BAD_TRACES = {
    "being replaced": (mark_removed, r"was being replaced by that of another fit"),
    "newer": (
        lambda trace: write_json(trace / "trace.json", {**read_json(trace / "trace.json"), "version": 3}),
        r"is of format version 3, .* Update lightning_tracin",
    ),
    "cut short": (lambda trace: truncated(trace / "trace.json", 40), r"trace\.json is damaged"),
    "empty": (lambda trace: (trace / "trace.json").write_text("{}"), r"trace\.json is damaged"),
    "a checkpoint": (lambda trace: truncated(checkpoint_file(trace), 40), r"checkpoint\.json is damaged"),
    "vocabulary": (lambda trace: truncated(trace / "vocabulary.json", 9), r"vocabulary\.json is damaged"),
}


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A result, and the folder that holds its file and its trace."""
    folder = tmp_path_factory.mktemp("beside")
    result = fitted(folder / "trace", trainer={"max_epochs": 2}).influence(loader(test_texts()))
    result.save(folder / "result.safetensors", k=K)
    result.save(folder / "scores.safetensors", k=0)
    return result, folder


@pytest.mark.parametrize(("damage", "told"), BAD_TRACES.values(), ids=BAD_TRACES)
def test_it_is_whole_beside_a_trace_that_cannot_be_read(beside, tmp_path, damage, told):
    before, folder = beside
    rows = before.rows(K)
    top = int(before.proponents(1).indices[2, 0])
    words, texts_of_tests = before.words(2, top), [each.test.text for each in before.explanations(k=1)]
    shutil.copytree(folder, tmp_path / "there")
    shutil.move(folder / "trace", folder / "away")  # or it would be found there
    try:
        damage(tmp_path / "there" / "trace")
        with pytest.warns(
            UserWarning, match=rf"(?s){told}.*Without it, the file of the result holds .* 3 strong"
        ) as all_:
            after = InfluenceResult.load(tmp_path / "there" / "result.safetensors")
        with pytest.warns(UserWarning, match=rf"(?s){told}.*Without it, nothing but the scores is left"):
            scores = InfluenceResult.load(tmp_path / "there" / "scores.safetensors").scores
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            InfluenceResult.load(tmp_path / "there" / "result.safetensors", trace=tmp_path / "there" / "trace")
    finally:
        shutil.move(folder / "away", folder / "trace")
    assert len(all_) == 1
    assert after.trace is None
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(scores, before.scores)
    assert after.rows(K) == rows
    assert after.words(2, top) == words
    assert [each.test.text for each in after.explanations(k=1)] == texts_of_tests


def test_a_trace_beside_it_serves_where_the_one_at_its_old_place_cannot_be_read(tmp_path):
    result = fitted(tmp_path / "here" / "trace").influence(loader(test_texts()))
    result.save(tmp_path / "here" / "result.safetensors", k=0)
    words = result.words(0, 1)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    BAD_TRACES["a checkpoint"][0](tmp_path / "here" / "trace")
    after = InfluenceResult.load(tmp_path / "there" / "result.safetensors")
    assert after.trace.path == tmp_path / "there" / "trace"
    assert after.words(0, 1) == words
