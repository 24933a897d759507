"""Examples as their task has them: prompts and completions, sources and targets, tags, sets of labels, numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, N_TRAIN, Family
from mutated_files import rehash
from rich.console import Console
from safetensors.torch import load_file, save_file
from spellings import trained
from toy import fitted, quiet

from lightning_tracin import InfluenceResult, Trace
from lightning_tracin.gradients.texts import IN_SECOND, Texts, label_sets_of
from lightning_tracin.report.explanation import Example, Word
from lightning_tracin.report.tables import shaded
from lightning_tracin.results.marked_words import marked
from lightning_tracin.results.reader import Reader
from lightning_tracin.storage.verification import verify


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What a family's fit answers, by name; each is fitted once."""
    found = {}

    def ask(name: str, family: Family | None = None) -> InfluenceResult:
        if name not in found:
            family = family or FAMILIES[name]
            trainer = fitted(tmp_path_factory.mktemp(name), family.build(), family.train_loader())
            found[name] = trainer.influence(family.test_loader())
        return found[name]

    return ask


def prompted() -> Family:
    """A language model whose labels leave out the first three tokens."""
    family = FAMILIES["gpt2-causal"]
    labels = [torch.cat([torch.full_like(each["labels"][:3], -100), each["labels"][3:]]) for each in family.examples]
    examples = [{**each, "labels": own} for each, own in zip(family.examples, labels, strict=True)]
    return replace(family, examples=examples)


def test_a_prompt_stands_apart_from_its_completion(asked, tmp_path):
    result = asked("prompted", prompted())
    saved = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    for of in (*result.explanations(), *saved.explanations()):
        for example in (of.test, *(each.example for each in (*of.proponents, *of.opponents))):
            assert [word.is_prompt for word in example.words] == [number < 3 for number in range(len(example.words))]
    test = next(result.explanations([0])).test
    styles = [str(span.style) for span in shaded(test, (), 1.0).spans]
    assert styles == ["dim"] * 3
    plain = next(asked("gpt2-causal").explanations([0])).test
    assert not any(word.is_prompt for word in plain.words)
    assert plain.text == test.text


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_source_and_target_stand_on_two_sides(asked, name):
    family = FAMILIES[name]
    for of in asked(name).explanations():
        source, target = of.test.text.split(" ‖ ")
        batch = family.examples[N_TRAIN + of.test.index]
        assert source.split() == [str(int(token)) for token in batch["input_ids"][batch["attention_mask"].bool()]]
        read = [str(int(token)) for token in batch["labels"][:-1] if token >= 0]
        assert target.split()[1 : len(read) + 1] == read  # by the decoder, between its first token and padding
        for each in (*of.proponents, *of.opponents):
            assert each.example.text.count("‖") == 1
    asked_alone = quiet().label_issues(trace=asked(name).trace, method="tracin-we")
    assert {row["text"].count("‖") for row in asked_alone.rows()} == {1}
    assert asked_alone.rows() == asked(name).label_issues("tracin-we").rows()


def test_tags_are_shown_beside_their_words(asked):
    result = asked("bert-tokens")
    named = replace(result, label_names={0: "O", 1: "PER", 2: "LOC"})
    for of in named.explanations():
        labels = FAMILIES["bert-tokens"].examples[N_TRAIN + of.test.index]["labels"].tolist()
        expected = [{0: None, 1: "PER", 2: "LOC", -100: None}[label] for label in labels][: len(of.test.words)]
        assert [word.tag for word in of.test.words] == expected
        shown = shaded(of.test, (), 1.0).plain.split()
        assert shown == [word.text + ("" if word.tag is None else f"/{word.tag}") for word in of.test.words]
        assert "/" not in of.test.text  # the text itself stays


def test_sets_of_labels_are_named(asked, tmp_path):
    result = asked("bert-multi-label")
    saved = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    for of in (*result.explanations(), *saved.explanations()):
        for example, index in [(of.test, N_TRAIN + of.test.index)] + [
            (each.example, each.example.index) for each in (*of.proponents, *of.opponents)
        ]:
            labels = FAMILIES["bert-multi-label"].examples[index]["labels"]
            names = [f"LABEL_{number}" for number in torch.nonzero(labels)[:, 0].tolist()]
            assert example.label == (", ".join(names) or "none")


def test_the_review_of_labels_names_sets_of_them(asked):
    for issue in asked("bert-multi-label").label_issues().issues:
        labels = FAMILIES["bert-multi-label"].examples[issue.example.index]["labels"]
        names = [f"LABEL_{number}" for number in torch.nonzero(labels)[:, 0].tolist()]
        assert issue.row["given_label"] == (", ".join(names) or "none")


def test_labels_of_a_regression_are_numbers(asked):
    result = asked("bert-regression")
    assert not result.label_names
    labels = torch.tensor([0.0, 1.0, 0.25, -2.0, 1987.4321]).double()
    result = replace(result, test_texts=replace(result.test_texts, labels=labels))
    assert [of.test.label for of in result.explanations()] == ["0", "1", "0.25", "-2", "1987.43"]


def test_labels_that_are_no_sets():
    assert label_sets_of(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), 2).tolist() == [2.0, 3.0]
    for labels in (
        None,
        torch.tensor([0, 1]),
        torch.tensor([[0.5, 1.0], [0.0, 1.0]]),
        torch.ones(2, 54),
        torch.ones(2, 1),
    ):
        assert label_sets_of(labels, 2).isnan().all()
    most = Texts(1, *[torch.empty(0, dtype=torch.long)] * 2, torch.tensor([torch.nan]).double())
    most = replace(most, label_sets=label_sets_of(torch.ones(1, 53), 1))
    assert most.label_set_of(0) == tuple(range(53))


def test_a_masked_word_is_no_prompt_and_has_no_tag():
    words = [Word("[MASK]", "", (0,), special=True), Word("b", " ", (1,))]
    assert marked(words, [4, 5], [9, -1], {0: "LABEL_0", 1: "LABEL_1"}) == words


COLUMNS = ("marks", "label_sets")


def test_traces_and_results_without_marks_are_read(asked, tmp_path):
    result = asked("prompted", prompted())
    copied = Path(shutil.copytree(result.trace.path, tmp_path / "trace"))
    file = copied / "texts" / "00000.safetensors"
    save_file({name: each for name, each in load_file(file).items() if name not in COLUMNS}, file)
    rehash(copied)
    assert not [problem for _, problem in verify(Trace(copied)) if problem]
    older = replace(result, trace=Trace(copied), test_texts=Texts(*list(vars(result.test_texts).values())[:4]))
    for mine, its in zip(result.explanations(), older.explanations(), strict=True):
        assert mine.test.text == its.test.text
        assert [each.example.text for each in mine.proponents] == [each.example.text for each in its.proponents]
        assert not any(word.is_prompt for each in its.proponents for word in each.example.words)


@pytest.mark.parametrize(
    ("column", "value"), [("marks", -3), ("label_sets", 0.5), ("label_sets", -1.0), ("label_sets", 2.0**60)]
)
def test_marks_that_were_forged(asked, tmp_path, column, value):
    trace = asked("prompted", prompted()).trace
    copied = Path(shutil.copytree(trace.path, tmp_path / "trace"))
    file = copied / "texts" / "00000.safetensors"
    tensors = load_file(file)
    tensors[column].view(-1)[1] = value
    save_file(tensors, file)
    rehash(copied)
    (problem,) = [problem for _, problem in verify(Trace(copied)) if problem]
    assert f"{file} is damaged: {column} holds" in problem
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        Trace(copied).texts([0, 1])


def test_texts_of_two_are_printed(asked, capsys):
    asked("t5").show(0, k=1, console=Console(width=200))
    assert capsys.readouterr().out.count("‖") >= 2


def test_the_token_that_a_decoder_begins_with_is_of_the_second_text():
    words = [Word("le", "", (0,)), Word("chat", " ", (1,)), Word("</s>", "", (2,), special=True)]
    words += [Word("<pad>", "", (3,), special=True), Word("the", "", (4,)), Word("cat", " ", (5,))]
    shown = Example(0, tuple(marked(words, range(6), [-1, -1, -1, IN_SECOND, -1, -1], {})), None)
    assert shaded(shown, (), 1.0).plain == "le chat</s> ‖ <pad>the cat"
    assert shown.text == "le chat ‖ the cat"


def test_an_example_that_is_spelled_anew_keeps_its_two_sides():
    tokenizer = trained("WordPiece")
    ids = [*tokenizer("Hello again")["input_ids"], *tokenizer("lines and")["input_ids"]]
    border = len(tokenizer("Hello again")["input_ids"])
    marks = [IN_SECOND if place == border else -1 for place in range(len(ids))]
    reader = Reader({number: word for word, number in tokenizer.get_vocab().items()}, {}, tokenizer)
    shown = reader.example(0, ids, None, None, marks=marks)
    respelled = reader.respelled(shown, ("HELLO  again", "lines AND"))
    assert shown.text == "hello again ‖ lines and"
    assert respelled.text == "HELLO  again ‖ lines AND"
