"""Tokens that are left out by word, as special or as common ones, against the same tokens by id."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from spelled_fits import TEST, TOKENS, TRAIN, Spelled, batches, spelled
from toy import fitted, loader, quiet, test_texts

from lightning_tracin import InfluenceResult, TracInLast, TracInSum, TracInWE


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    return spelled(tmp_path_factory.mktemp("spelled") / "trace")


def ids(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


def common() -> list[int]:
    """Counted by hand: the tokens of more than a tenth of the training texts."""
    counts = Counter(token for text in TRAIN for token in {"[CLS]", *text.split()})
    return ids(*sorted(token for token, count in counts.items() if count > len(TRAIN) / 10))  # as xdist collects twice


@pytest.mark.parametrize(
    ("named", "tokens"),
    [
        (["special"], ids("[PAD]", "[CLS]", "[UNK]")),
        (["common"], common()),
        (["special", "common"], [*common(), *ids("[PAD]", "[CLS]", "[UNK]")]),
        (["cup"], ids("cup")),
        (["##s"], ids("##s")),
        (["cup", TOKENS.index("bank"), "common"], [*common(), *ids("cup", "bank")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_scores_and_words_are_those_of_the_ids(fit, named, tokens, normalize):
    by_name = fit.influence(batches(TEST), method=TracInWE(exclude_tokens=named, normalize=normalize))
    by_id = fit.influence(batches(TEST), method=TracInWE(exclude_tokens=tokens, normalize=normalize))
    assert torch.equal(by_name.scores, by_id.scores)
    assert by_name.words(0, 0) == by_id.words(0, 0)
    assert by_name.method.exclude_tokens == tuple(named)
    assert repr(tuple(named)) in str(by_name)
    if normalize is None:  # else it is 1 for all
        assert torch.equal(fit.self_influence(method=TracInWE(exclude_tokens=named)), by_id.self_influence())


def test_common_tokens_are_some_and_not_all():
    assert set(common()) == set(ids("[CLS]", "the", "team", "goal", "bank"))


def test_a_sum_leaves_out_the_words_of_its_part(fit):
    def ask(named):
        return fit.influence(batches(TEST), method=TracInSum((TracInWE(exclude_tokens=named), TracInLast())))

    assert torch.equal(ask(["special", "cup"]).scores, ask(ids("[PAD]", "[CLS]", "[UNK]", "cup")).scores)


def test_a_saved_result_has_the_ids_and_needs_no_trace(fit, tmp_path):
    result = spelled(tmp_path / "trace").influence(batches(TEST), method=TracInWE(exclude_tokens=["common", "cup"]))
    expected = result.words(0, 0)
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    assert loaded.words(0, 0) == expected
    assert loaded.common_tokens.tolist() == sorted(common())
    shutil.rmtree(tmp_path / "trace")
    alone = InfluenceResult.load(tmp_path / "result.safetensors")
    assert alone.method == result.method
    assert alone.method.excluded.ids == tuple(sorted({*common(), *ids("cup")}))
    assert torch.equal(alone.scores, result.scores)


def test_a_method_that_was_looked_up_in_one_trace_is_looked_up_anew_in_another(fit, tmp_path):
    looked_up = fit.influence(batches(TEST), method=TracInWE(exclude_tokens=["common"])).method
    other = spelled(tmp_path / "trace", ["the cup", "a cup", "the loan"])
    again = other.influence(batches(TEST), method=looked_up)
    assert set(again.method.excluded.ids) == set(ids("[CLS]", "the", "cup", "a", "loan"))


def test_gradients_that_the_query_stores_itself(fit, tmp_path):
    method = TracInWE(exclude_tokens=["special", "common"])
    later = spelled(tmp_path / "trace", cache="on_demand").influence(batches(TEST), method=method)
    torch.testing.assert_close(later.scores, fit.influence(batches(TEST), method=method).scores)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("Cup", r"'Cup', but no token of the training set prints so\. Near it are: 'cup'"),
        ("cups", r"'cups', which is not one token but 2: 'cup', '##s'\. Name those"),
        ("tariff", r"'tariff', but no token"),
    ],
)
def test_a_word_that_is_no_token(fit, word, message):
    with pytest.raises(ValueError, match=message):
        fit.influence(batches(TEST), method=TracInWE(exclude_tokens=[word]))


def test_a_token_that_no_training_example_holds_leaves_out_nothing(fit):
    plain = fit.influence(batches(TEST)).scores
    assert torch.equal(fit.influence(batches(TEST), method=TracInWE(exclude_tokens=["unused"])).scores, plain)


@pytest.mark.parametrize("named", ["the", "special"])
def test_words_need_a_vocabulary_of_words(toy, named):
    with pytest.raises(ValueError, match=r"has only their ids.*had no tokenizer. Pass token ids"):
        toy.influence(loader(test_texts()), method=TracInWE(exclude_tokens=[named]))
    assert toy.influence(loader(test_texts()), method=TracInWE(exclude_tokens="common")).method.excluded.ids


def test_what_training_never_drew_is_not_counted(tmp_path):
    pl.seed_everything(0, verbose=False)
    data = batches(TRAIN, sampler=[0, 1, 2, 3])
    result = fitted(tmp_path / "trace", Spelled(), data).influence(batches(TEST))
    held = Counter(token for text in TRAIN[:4] for token in {"[CLS]", *text.split()})
    assert result.common_tokens.tolist() == sorted(ids(*held))  # one of four is more than a tenth


def test_in_another_process(fit):
    method = TracInWE(exclude_tokens=["common", "cup"])
    trace = fit.callbacks[0].trace.path
    asked = quiet().influence(batches(TEST), Spelled(), trace=trace, method=method)
    assert torch.equal(asked.scores, fit.influence(batches(TEST), method=method).scores)
