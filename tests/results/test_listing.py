"""What is listed of scores: who pushed to which side, equal texts once, words that say something first."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
from rich.console import Console
from spelled_fits import TEST, TOKENS, TRAIN, batches, spelled
from toy import Toy, fitted, loader, test_texts, texts
from training_examples import examples_of_training

from lightning_tracin import InfluenceResult, TracInLast, TracInWE
from lightning_tracin.results.listing import TextKeys, listed
from lightning_tracin.results.packed_examples import PackedExamples
from lightning_tracin.results.reader import Reader

REPEATED = [*TRAIN, TRAIN[0], TRAIN[1], TRAIN[0], *TRAIN[:4]]

LABELS = [number % 3 for number in range(len(TRAIN))]
LABELS += [LABELS[0], (LABELS[1] + 1) % 3, LABELS[0], *LABELS[:4]]  # one text has another label the second time


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    return spelled(tmp_path_factory.mktemp("repeated") / "trace", REPEATED, LABELS)


@pytest.fixture(scope="module")
def result(fit):
    return fit.influence(batches(TEST))


def groups() -> dict[tuple[str, int], list[int]]:
    """The training examples of each text and label."""
    found = defaultdict(list)
    for index, each in enumerate(zip(REPEATED, LABELS, strict=True)):
        found[each].append(index)
    return found


@pytest.mark.parametrize("k", [1, 3, 50])
def test_each_text_is_one_entry_with_all_that_say_the_same(result, k):
    for row, of in enumerate(result.explanations(k=k)):
        for side, sign in ((of.proponents, 1), (of.opponents, -1)):
            found = [(each.example.index, *each.equal) for each in side]
            scores = result.scores[row]
            expected = [tuple(indices) for indices in groups().values() if float(scores[indices[0]]) * sign > 0]
            assert {tuple(sorted(each)) for each in found} <= set(expected)
            assert len(found) == min(k, len(expected))
            strengths = [float(scores[each[0]]) * sign for each in found]
            assert strengths == sorted(strengths, reverse=True)
            left = [
                float(scores[each[0]]) * sign
                for each in expected
                if tuple(each) not in {tuple(sorted(f)) for f in found}
            ]
            assert not left or min(strengths) >= max(left) * (1 - 1e-5)
            for each in side:
                together = [float(scores[index]) for index in (each.example.index, *each.equal)]
                assert together == pytest.approx([each.score] * len(together), rel=1e-4)
                total = float(result.totals[row, 0 if sign > 0 else 1])
                assert each.share == pytest.approx(sum(together) / total, rel=1e-5)


def test_shares_of_all_entries_are_all_of_it(result):
    for of in result.explanations(k=100):
        for side in (of.proponents, of.opponents):
            assert not side or sum(each.share for each in side) == pytest.approx(1, rel=1e-5)


def test_the_strongest_only_are_joined_as_far_as_they_were_kept(fit, result):
    kept = fit.influence(batches(TEST), k=len(REPEATED))
    for mine, its in zip(kept.explanations(k=4), result.explanations(k=4), strict=True):
        assert [each.equal for each in mine.proponents] == [each.equal for each in its.proponents]
    few = next(fit.influence(batches(TEST), k=3).explanations([0], k=3))
    assert sum(len(each.equal) + 1 for each in few.proponents) <= 3


def test_only_as_many_are_looked_at_as_it_takes(result):
    asked = []

    def pushing(row, n, *, proponents):
        asked.append(n)
        return result._pushing(row, n, proponents=proponents)

    found = listed(1, [0], pushing, TextKeys(result.trace))
    assert max(asked) <= 8
    assert len(found[0][0]) == 1
    asked.clear()
    alone = listed(2, [0, 1], pushing, TextKeys({}))  # without texts each counts as another
    assert asked == [3] * 4
    assert all(not entry.equal for sides in alone.values() for side in sides for entry in side)


def test_no_positive_score_is_an_opponent_nor_a_negative_one_a_proponent(toy):
    for result in (toy.influence(loader(test_texts())), toy.influence(loader(test_texts()), k=8)):
        rows = result.rows(50)
        assert rows
        assert all((row["score"] > 0) == (row["role"] == "proponent") and row["score"] for row in rows)
        for side in (result.proponents(8), result.opponents(8)):  # the tensors keep their shape
            assert side.values.shape == side.indices.shape == (len(test_texts()), 8)


def test_without_opponents_it_is_said(toy):
    result = toy.influence(loader(test_texts()))
    result.scores.clamp_(min=0)
    assert "No opponents" in str(result)
    assert {row["role"] for row in result.rows()} == {"proponent"}
    result.scores.zero_()
    assert result.to_pandas().empty
    assert list(result.to_pandas().columns) == list(toy.influence(loader(test_texts())).to_pandas().columns)
    assert "No proponents" in str(result)


def test_equal_texts_are_named_in_the_terminal(result, capsys):
    of = next(result.explanations([0], k=10))
    several = next(each for each in of.proponents if each.equal)
    result.show(0, k=10, console=Console(width=200))
    printed = capsys.readouterr().out
    others = ", ".join(map(str, several.equal))
    (line,) = (each for each in printed.split("No ")[0].splitlines() if f"equal texts: also {others})" in each)
    assert f"train {several.example.index}  " in line
    assert line.index("label") < line.index(f"({len(several.equal) + 1} equal texts")  # what is cut is not the label


def test_a_word_of_which_a_piece_is_shared_is_called_by_the_piece(result):
    loan = TRAIN.index("the bank loan £ ##900")
    words = dict(result.words(1, loan))
    assert "£…" in words
    assert not words.keys() & {"£900", "£"}
    assert sum(words.values()) == pytest.approx(float(result.scores[1, loan]), rel=1e-4)
    assert "cup…" in dict(result.words(0, 0))  # "the cups goal" for "the cup match"
    of = next(result.explanations([1], k=50))
    listed_loan = next(each for each in (*of.proponents, *of.opponents) if each.example.index == loan)
    assert dict(listed_loan.strongest_words(50)).keys() == {word for word, term in words.items() if term}


def test_common_words_are_listed_last_and_all_still_add_up(result):
    common = {TOKENS[token] for token in result.common_tokens.tolist()}
    assert "the" in common
    for of in result.explanations(k=50):
        for each in (*of.proponents, *of.opponents):
            listed_words = each.listed_words(50)
            stops = [word.is_stop for word in listed_words]
            assert stops == sorted(stops)
            assert all(word.is_stop == (word.name.strip("…") in common) for word in listed_words)
            assert sum(word.term for word in listed_words) == pytest.approx(each.score, rel=1e-4, abs=1e-12)
            by_strength = [abs(term) for _, term in each.strongest_words(50, stops_last=False)]
            assert by_strength == sorted(by_strength, reverse=True)
            assert sum(each.terms) == pytest.approx(each.score, rel=1e-4, abs=1e-12)


def test_the_word_table_marks_common_words_and_leaves_them_in_their_places(result):
    table = result.word_table(n=None)
    strengths = table.values.abs().sum((1, 2)).tolist()
    assert strengths == sorted(strengths, reverse=True)
    common = set(result.common_tokens.tolist())
    examples = examples_of_training(result, range(len(REPEATED))).values()
    expected = {
        word.text for each in examples for word in each.words if all(each.ids[place] in common for place in word.places)
    }
    assert {word for word, is_common in zip(table.words, table.common, strict=True) if is_common} <= expected
    assert all(table.is_stop(number) == (word in expected) for number, word in enumerate(table.words))


def test_no_share_of_a_word_is_over_all_of_it(result, capsys):
    for row in range(len(TEST)):
        result.show(row, k=50, console=Console(width=400))
    lines = [line for line in capsys.readouterr().out.splitlines() if "words: " in line]
    shares = [[int(share) for share in re.findall(r"(\d+)%", line)] for line in lines]
    assert len(shares) > 20
    assert all(0 <= sum(of_line) <= 103 for of_line in shares)  # each is rounded


def test_where_common_words_weigh_most_it_is_said_what_shows_more(fit, result, tmp_path):
    (note,) = [note for note in result.notes if "tenth of the training examples" in note]
    setting = 'TracInWE(normalize="cosine", exclude_tokens=["special", "common"])'
    assert f"method={setting} leaves them out" in note
    assert note.split("%")[0].isdecimal()
    advised = fit.influence(batches(TEST), method=eval(setting, {"TracInWE": TracInWE}))
    assert not any("tenth of" in each for each in advised.notes)
    assert not any("tenth of" in each for each in fit.influence(batches(TEST), method=TracInLast()).notes)
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    assert loaded.notes == result.notes
    assert str(loaded) == str(result)


def test_where_no_word_is_left_it_is_said(fit):
    tokens = range(len(TOKENS))
    (note,) = fit.influence(batches(TEST), method=TracInWE(exclude_tokens=tokens)).notes
    assert f"but those that exclude_tokens=(<{len(TOKENS)} token ids>) leaves out, so that no word adds" in note


def test_the_advice_fits_a_trace_without_words_or_moments(tmp_path):
    class Plain(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = texts()
    data.tensors[0][:, 0] = 1
    test = test_texts()
    test.tensors[0][:, 0] = 1
    result = fitted(tmp_path / "trace", Plain(), loader(data)).influence(loader(test))
    (note,) = [note for note in result.notes if "tenth of" in note]
    assert 'TracInWE(normalize="cosine", exclude_tokens=["common"])' in note


@pytest.mark.parametrize("others", [[-1, -1, 7, 8], [-1, 6, 9, 8], [-1, -2, -2, -2]])
def test_equal_tokens_with_other_marks_are_no_equal_texts(others):
    """A longer prompt, other labels of tokens, or a border elsewhere: each has gradients of its own."""
    ids, marks = [5, 6, 7, 8], [-1, 6, 7, 8]
    reader = Reader({token: f"w{token}" for token in ids}, {})
    examples = [reader.example(index, ids, None, None, marks=each) for index, each in enumerate((marks, marks, others))]
    keys = TextKeys(PackedExamples.of(enumerate(examples))).of(range(3))  # as a saved result holds them
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
