from __future__ import annotations

import io
import operator
import re
import shutil

import pytest
import torch
from rich.console import Console
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, test_texts, texts

from lightning_tracin import InfluenceResult, TracInLast, TracInWE
from lightning_tracin.report.explanation import Example, Explanation, Influential, Word
from lightning_tracin.report.tables import explained
from lightning_tracin.results import stored_result


@pytest.fixture(scope="module")
def result(toy):
    return toy.influence(loader(test_texts()))


@pytest.fixture(params=[None, 4], ids=["all scores", "k=4"])
def saved(request, toy, tmp_path):
    """A result, and what comes back from its file."""
    result = toy.influence(
        loader(test_texts()), method=TracInWE(normalize="cosine", exclude_tokens=[5]), k=request.param
    )
    return result, InfluenceResult.load(result.save(tmp_path / "result.safetensors"))


def test_what_is_saved_comes_back(saved):
    before, after = saved
    assert after.method == before.method
    assert repr(after) == repr(before)
    assert (after.scores is None) == (before.scores is None)
    if before.scores is not None:
        assert torch.equal(after.scores, before.scores)
    for side in ("proponents", "opponents"):
        for mine, its in zip(getattr(before, side)(4), getattr(after, side)(4), strict=True):
            assert torch.equal(mine, its)
    assert after.words(1, 3) == before.words(1, 3)
    assert str(after) == str(before)


def test_a_result_finds_its_trace_where_both_were_moved(toy, tmp_path):
    fit = fitted(tmp_path / "here" / "trace")
    result = fit.influence(loader(test_texts()))
    result.save(tmp_path / "here" / "result.safetensors")
    words = result.words(0, 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert InfluenceResult.load(tmp_path / "there" / "result.safetensors").words(0, 1) == words


@pytest.mark.parametrize("replaced", [False, True], ids=["gone", "replaced by another fit"])
def test_scores_alone_print_without_their_trace_but_have_no_words(tmp_path, replaced):
    result = fitted(tmp_path / "trace").influence(loader(test_texts()))
    path = result.save(tmp_path / "result.safetensors", k=0)
    shutil.rmtree(tmp_path / "trace")
    if replaced:
        fitted(tmp_path / "trace")
    loaded = InfluenceResult.load(path)
    assert "no text stored" in str(loaded)
    for each in (loaded, result):
        with pytest.raises(FileNotFoundError, match="trace"):
            each.words(0, 0)


@pytest.mark.parametrize("replaced", [False, True], ids=["gone", "replaced by another fit"])
@pytest.mark.parametrize("k", [None, 4])
def test_a_result_in_memory_whose_trace_is_lost_shows_no_text_and_never_that_of_another(tmp_path, replaced, k):
    result = fitted(tmp_path / "trace").influence(loader(test_texts()), k=k)
    expected = result.proponents(3)
    shutil.rmtree(tmp_path / "trace")
    if replaced:
        fitted(tmp_path / "trace", data=loader(texts(seed=9)))
    frame = result.to_pandas(k=2)
    assert set(frame.train_text) == {""}
    assert frame.train_label.isna().all()
    printed = str(result)
    assert "no text stored" in printed
    assert f"{float(expected.values[0, 0]):+.3g}" in printed


@pytest.mark.parametrize(("version", "remedy"), [(99, "Update lightning_tracin"), (1, "Ask trainer.influence again")])
def test_a_result_of_another_version(result, tmp_path, monkeypatch, version, remedy):
    monkeypatch.setattr(stored_result, "FORMAT_VERSION", version)
    path = result.save(tmp_path / "result.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"format version {version}, .*{remedy}"):
        InfluenceResult.load(path)


def test_saving_makes_folders_and_tells_where(result, tmp_path):
    path = result.save(str(tmp_path / "a" / "b" / "result.safetensors"))
    assert path == tmp_path / "a" / "b" / "result.safetensors"
    assert [each.name for each in path.parent.iterdir()] == ["result.safetensors"]


def test_a_file_that_holds_no_result(toy):
    weights = toy.callbacks[0].trace.checkpoints[0].path / "weights.safetensors"
    with pytest.raises(ValueError, match="holds no InfluenceResult"):
        InfluenceResult.load(weights)


def test_proponents_and_opponents_are_sorted(result):
    for test_index in range(N_TEST):
        row = result.scores[test_index].tolist()  # with many zeros, where no word is shared: ties go to the first
        falling, rising = (sorted(range(N_TRAIN), key=lambda index: sign * row[index]) for sign in (-1, 1))
        assert result.proponents(15).indices[test_index].tolist() == falling[:15]
        assert result.opponents(15).indices[test_index].tolist() == rising[:15]


def test_aggregate_by_hand(result):
    scores = result.scores.tolist()
    mean, rank, vote = [0.0] * N_TRAIN, [0.0] * N_TRAIN, [0.0] * N_TRAIN
    assert any(len(set(row)) < N_TRAIN for row in scores)  # pairs that share no word
    for row in scores:
        for place, index in enumerate(sorted(range(N_TRAIN), key=lambda index: row[index])):
            mean[index] += row[index] / N_TEST
            lower, equal = (sum(map(how, row, [row[index]] * N_TRAIN)) for how in (operator.lt, operator.eq))
            rank[index] += (lower + (equal - 1) / 2) / N_TEST
            vote[index] -= max(3 - place, 0) if row[index] < 0 else 0
    torch.testing.assert_close(result.aggregate("mean"), torch.tensor(mean), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(result.aggregate("rank"), torch.tensor(rank))
    torch.testing.assert_close(result.aggregate("vote", k=3), torch.tensor(vote))


def test_votes_count_ten_opponents_by_default_and_all_of_fewer(result):
    assert torch.equal(result.aggregate("vote"), result.aggregate("vote", k=10))
    votes = result.aggregate("vote", k=N_TRAIN)
    negative = (result.scores < 0).sum(1).tolist()  # others have no vote, whatever their place
    assert float(votes.sum()) == -sum(N_TRAIN - place for n in negative for place in range(n))
    with pytest.warns(UserWarning, match="larger than the training set"):
        assert torch.equal(result.aggregate("vote", k=N_TRAIN + 5), votes)


def test_votes_need_only_the_strongest(toy, result):
    strongest = toy.influence(loader(test_texts()), k=3)
    assert torch.equal(strongest.aggregate("vote", k=3), result.aggregate("vote", k=3))


@pytest.mark.parametrize("arguments", [("median",), ("mean", 3)])
def test_wrong_arguments_of_aggregate(result, arguments):
    with pytest.raises(ValueError, match=r"must be 'mean'|goes with"):
        result.aggregate(*arguments)


def test_pandas(result):
    frame = result.to_pandas(k=2)
    assert len(frame) == N_TEST * 2 * 2
    first = frame[(frame.test_index == 3) & (frame.role == "opponent") & (frame["rank"] == 1)].iloc[0]
    assert first.train_index == int(result.opponents(1).indices[3, 0])
    assert first.score == pytest.approx(float(result.scores[3].min()))
    ids, label = texts()[first.train_index]
    assert first.train_text == " ".join(str(token) for token in ids.tolist() if token)
    assert first.train_label == str(int(label))
    (explanation,) = result.explanations([3], k=1)
    test = explanation.test
    assert (first.test_text, first.test_label, first.prediction) == (test.text, test.label, test.prediction)
    assert (first.confidence, first.target) == (test.confidence, test.label)
    words = sorted(result.words(3, first.train_index), key=lambda word: -abs(word[1]))[:5]
    assert [(each["word"], each["term"]) for each in first.words] == [word for word in words if word[1]]


def test_pandas_of_the_strongest_only(toy, result):
    kept = toy.influence(loader(test_texts()), k=3).to_pandas()
    assert len(kept) == int(
        (result.scores > 0).sum(1).clamp(max=3).sum() + (result.scores < 0).sum(1).clamp(max=3).sum()
    )
    assert kept.equals(result.to_pandas(k=3))


def test_printing_shows_texts_labels_scores_and_how_many_are_left(result):
    printed = str(result)
    top = result.proponents(1)
    assert "Test example 0, label" in printed
    assert f"{float(top.values[0, 0]):+.3g}" in printed
    assert " ".join(str(token) for token in texts()[int(top.indices[0, 0])][0].tolist() if token) in printed
    assert f"{N_TEST - 3} more test examples" in printed
    assert repr(result) == f"InfluenceResult(n_test={N_TEST}, n_train={N_TRAIN}, method={TracInWE()})"


def test_a_notebook_shows_what_is_printed(result):
    bundle = result._repr_mimebundle_([], [])
    assert "Test example 0" in bundle["text/html"]
    assert "Test example 0" in bundle["text/plain"]


def test_the_module_names_its_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "influence_label_names", lambda self: {0: "calm", 1: "angry", 2: "odd"})
    printed = str(fitted(tmp_path / "trace").influence(loader(test_texts())))
    assert "label calm" in printed or "label angry" in printed or "label odd" in printed
    assert "label 0" not in printed


def test_label_names_that_are_no_names_by_number_are_refused_before_training(tmp_path, monkeypatch):
    asked = fitted(tmp_path / "trace")
    monkeypatch.setattr(Toy, "influence_label_names", lambda self: ["calm", "angry"])
    message = r"a mapping from each label's number to its name, such as .* but returned \['calm', 'angry'\]"
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match=message):
        asked.influence(loader(test_texts()))


def test_showing_one_test_example(result, capsys):
    result.show(4, k=7)
    printed = capsys.readouterr().out
    assert "Test example 4" in printed
    opponents = result.opponents(7)
    for score, index in zip(opponents.values[4].tolist(), opponents.indices[4].tolist(), strict=True):
        assert score >= 0 or f"{score:+.3g}  train {index} " in printed


@pytest.mark.parametrize("method", [TracInWE(normalize="train"), TracInLast()], ids=repr)
def test_self_influence_is_that_of_the_trainer(toy, method):
    found = toy.influence(loader(test_texts()), method=method).self_influence()
    assert torch.equal(found, toy.self_influence(method=method))
    assert found.shape == (N_TRAIN,)


def test_shares_are_parts_of_all_scores_of_a_sign(toy, result):
    strongest = toy.influence(loader(test_texts()), k=2)
    for row, (all_of_them, kept) in enumerate(
        zip(result.explanations(k=N_TRAIN), strongest.explanations(), strict=True)
    ):
        positive = result.scores[row].clamp(min=0)
        shares = [each.share for each in all_of_them.proponents if each.score > 0]
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == pytest.approx(float(positive.max() / positive.sum()), rel=1e-5)
        assert [each.share for each in kept.proponents] == pytest.approx(shares[:2])


def test_predictions_are_those_of_the_last_checkpoint(toy, result):
    module = toy.lightning_module
    module.load_state_dict(toy.callbacks[0].trace.checkpoints[-1].weights())
    module.eval()
    with torch.no_grad():
        probabilities = module(test_texts().tensors[0]).softmax(1)
    torch.testing.assert_close(result.predictions[:, 0].long(), probabilities.argmax(1))
    torch.testing.assert_close(result.predictions[:, 1].float(), probabilities.max(1).values)
    labels = test_texts().tensors[1]
    mistaken = [each.test.is_mistaken for each in result.explanations()]
    assert mistaken == (probabilities.argmax(1) != labels).tolist()


def test_words_are_sorted_by_magnitude(result):
    terms = [abs(term) for _, term in result.words(2, int(result.proponents(1).indices[2, 0]))]
    assert terms == sorted(terms, reverse=True)


@pytest.mark.parametrize("pair", [(N_TEST, 0), (-1, 0), (0, N_TRAIN), (0, -1)])
def test_indices_beyond_the_data(result, pair):
    with pytest.raises(IndexError, match="examples 0 to"):
        result.words(*pair)


@pytest.mark.parametrize("test_index", [N_TEST, -1])
def test_showing_a_test_example_that_there_is_not(result, test_index):
    with pytest.raises(IndexError, match=f"rows 0 to {N_TEST - 1} .*, but got {test_index}"):
        result.show(test_index)


def test_rows_of_a_few_test_examples_are_titled_by_their_index(toy):
    result = toy.influence(loader(test_texts(), sampler=[5, 2]))
    printed = str(result)
    assert "Test example 2, label" in printed
    assert "Test example 5, label" in printed
    assert [int(row) for row in re.findall(r"row (\d)", printed)] == [0, 1]
    assert "row" not in str(toy.influence(loader(test_texts(), sampler=[0, 1])))  # the index says it
    assert "more test example" not in printed
    frame = result.to_pandas(2)
    assert set(zip(frame.test_row, frame.test_index, strict=True)) == {(0, 2), (1, 5)}
    assert result.test_indices[frame.test_row.tolist()].tolist() == frame.test_index.tolist()
    texts_of = {each.test.index: each.test.text for each in toy.influence(loader(test_texts())).explanations()}
    assert frame.test_text.tolist() == [texts_of[index] for index in frame.test_index]
    assert "3 more test examples: result.show(row), row up to 5" in str(toy.influence(loader(test_texts())))
    assert "k=2" in repr(toy.influence(loader(test_texts()), k=2))


def test_the_last_layer_has_no_words(toy):
    result = toy.influence(loader(test_texts()), method=TracInLast(normalize="cosine"))
    with pytest.raises(ValueError, match="no word terms"):
        result.words(0, 0)
    assert "Test example 0" in str(result)
    texts_of = [
        [each.test.text for each in toy.influence(loader(test_texts()), method=method).explanations()]
        for method in (TracInLast(), TracInWE())
    ]
    assert texts_of[0] == texts_of[1]
    assert all(texts_of[0])


def test_long_labels_and_texts_do_not_break_the_table():
    example = Example(0, tuple(Word("w" * 300, " ", (place,)) for place in range(500)), "label " * 30)
    terms = (1.0,) * 500
    explanation = Explanation(0, example, terms, (Influential(example, 1.0, 0.5, terms),), ())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(explained(explanation))
    assert max(map(len, console.export_text().splitlines())) <= 80
