"""TracInSum: each part in its own standard deviations, which are measured by a query and kept in its result."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logged_fits import fit as fit_and_log
from logged_fits import logged
from torch.utils.data import SubsetRandomSampler
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, test_texts

from lightning_tracin import InfluenceResult, TracInLast, TracInLayer, TracInSum, TracInWE
from lightning_tracin.querying import influence as influence_module
from lightning_tracin.scoring.naming import method_from_json, method_to_json
from lightning_tracin.scoring.spread import Spread
from lightning_tracin.storage import shards

WORDS, LAYER = TracInWE(normalize="cosine", weights="residual"), TracInLayer("hidden")
SUM = TracInSum((WORDS, LAYER, TracInLast()), mix=(1, 0.5, -2))
NOTHING = TracInLast(weights="equal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MOST_SHARD_EXAMPLES", 7)
        fitted(path, methods=("tracin-we", "tracin-last", "hidden"))
    return path


def ask(folder, method, **options):
    return quiet().influence(loader(test_texts()), Toy(), trace=folder, method=method, **options)


def of_parts(folder, method):
    return [ask(folder, part).scores.double() for part in method.parts]


@pytest.mark.parametrize("k", [None, 4])
def test_each_part_is_divided_by_the_deviation_of_its_scores(folder, k):
    result = ask(folder, SUM, k=k)
    parts = of_parts(folder, SUM)
    deviations = [float(scores.std(correction=0)) for scores in parts]
    assert result.method.scales == pytest.approx(deviations, rel=1e-5)
    expected = sum(mix * scores / scores.std(correction=0) for mix, scores in zip(SUM.mix, parts, strict=True))
    for side, largest in (("proponents", True), ("opponents", False)):
        found = getattr(result, side)(4)
        torch.testing.assert_close(found.values, expected.topk(4, largest=largest).values.float())
        torch.testing.assert_close(found.values, expected.gather(1, found.indices).float())


def test_words_add_up_to_the_share_of_their_part(folder):
    result, words = ask(folder, SUM), ask(folder, WORDS).scores
    for train_index in range(N_TRAIN):
        share = float(words[2, train_index]) / result.method.scales[0]
        assert sum(term for _, term in result.words(2, train_index)) == pytest.approx(share, rel=1e-5, abs=1e-6)


def test_what_was_measured_is_asked_with_again(folder, monkeypatch):
    result = ask(folder, SUM)
    assert replace(result.method, scales=None) == SUM
    monkeypatch.setattr("lightning_tracin.scoring.score._spread", None)  # nothing is measured
    assert torch.equal(ask(folder, result.method).scores, result.scores)
    one = quiet().influence(loader(test_texts(), batch_size=1), Toy(), trace=folder, method=result.method, k=2)
    torch.testing.assert_close(one.proponents(2).values, result.proponents(2).values)


def test_scales_of_1_sum_plain_scores(folder):
    plain = ask(folder, replace(SUM, scales=(1, 1, 1)))
    expected = sum(mix * scores for mix, scores in zip(SUM.mix, of_parts(folder, SUM), strict=True))
    torch.testing.assert_close(plain.scores.double(), expected, rtol=1e-5, atol=1e-7)
    assert plain.method.scales == (1, 1, 1)


def test_blocks_have_the_scales_of_the_first(folder, monkeypatch):
    first = [scores[0] for scores in of_parts(folder, SUM)]
    monkeypatch.setattr(influence_module, "_BLOCK_BYTES", 1)
    blocks = ask(folder, SUM)
    assert len(blocks.test_gradients) == N_TEST
    assert blocks.method.scales == pytest.approx([float(scores.std(correction=0)) for scores in first], rel=1e-5)
    assert torch.equal(blocks.scores, ask(folder, blocks.method).scores)
    assert sum(term for _, term in blocks.words(4, 3)) == pytest.approx(sum(t for _, t in _words(folder, blocks)))


def _words(folder, blocks):
    return ask(folder, blocks.method).words(4, 3)


def test_only_pairs_with_examples_that_were_drawn_count(tmp_path):
    drawn = [1, 2, 3, 5, 8, 13]
    fitted(tmp_path, data=loader(sampler=SubsetRandomSampler(drawn)))
    method = TracInSum((TracInWE(), TracInLast()))
    parts = [scores[:, drawn] for scores in of_parts(tmp_path, method)]
    deviations = [float(scores.std(correction=0)) for scores in parts]
    assert ask(tmp_path, method).method.scales == pytest.approx(deviations, rel=1e-5)
    own = quiet().self_influence(trace=tmp_path, method=method)
    of_each = [quiet().self_influence(trace=tmp_path, method=part).double() for part in method.parts]
    torch.testing.assert_close(own.double(), sum(each / each[drawn].std(correction=0) for each in of_each))


def test_a_saved_result_has_them(folder, tmp_path):
    result = ask(folder, SUM)
    result.save(tmp_path / "result.safetensors")
    loaded = InfluenceResult.load(tmp_path / "result.safetensors")
    assert loaded.method == result.method
    assert loaded.words(1, 4) == result.words(1, 4)


def test_a_sum_of_an_older_version_is_plain():
    content = json.loads(json.dumps(method_to_json(SUM)))
    assert method_from_json(content) == SUM
    del content["scales"]
    assert method_from_json(content) == replace(SUM, scales=(1, 1, 1))


@pytest.mark.parametrize("k", [None, 3])
def test_a_part_that_says_nothing_is_named(folder, k):
    silent = TracInWE(exclude_tokens=range(40))
    with pytest.raises(ValueError, match=r"The scores of TracInWE\(.* are 0 for all 120 pairs of .* Leave that part"):
        ask(folder, TracInSum((silent, TracInLast())), k=k)
    scores = ask(folder, TracInSum((silent, TracInLast()), scales=(1, 1))).scores
    torch.testing.assert_close(scores, ask(folder, TracInLast()).scores)


def test_a_single_pair_has_no_deviation(tmp_path):
    fitted(tmp_path, data=loader(sampler=SubsetRandomSampler([3])))
    with pytest.raises(ValueError, match="for all 1 pairs"):
        quiet().influence(
            loader(sampler=SubsetRandomSampler([2])), Toy(), trace=tmp_path, method=TracInSum((TracInLast(), NOTHING))
        )


def test_word_terms_need_scales(folder):
    """Of a result whose method was put into it by hand."""
    result = replace(ask(folder, SUM), method=SUM)
    with pytest.raises(ValueError, match="divided by in their sum is yet to be measured: use the method of a result"):
        result.words(0, 0)


class TestSelfInfluence:
    def test_it_has_the_deviations_of_the_parts_own(self, folder):
        method = TracInSum((TracInWE(), TracInLayer("hidden")), mix=(2, 1))
        own = [quiet().self_influence(trace=folder, method=part).double() for part in method.parts]
        expected = 2 * own[0] / own[0].std(correction=0) + own[1] / own[1].std(correction=0)
        torch.testing.assert_close(quiet().self_influence(trace=folder, method=method).double(), expected)

    def test_with_scales_nothing_is_measured(self, folder):
        method = ask(folder, SUM).method
        of_train = quiet().influence(loader(), Toy(), trace=folder, method=method).scores
        own = quiet().self_influence(trace=folder, method=method)
        torch.testing.assert_close(own, of_train.diagonal(), rtol=1e-4, atol=1e-5)

    def test_a_cosine_among_the_parts_changes_no_order(self, folder):
        method = TracInSum((TracInWE(normalize="cosine"), TracInLast()))
        own = quiet().self_influence(trace=folder, method=method)
        last = quiet().self_influence(trace=folder, method=TracInLast()).double()
        apart = own.double() - last / last.std(correction=0)
        torch.testing.assert_close(apart, apart[:1].expand(N_TRAIN), rtol=1e-4, atol=1e-5)

    def test_labels_are_reviewed_by_it_without_a_last_layer(self, tmp_path):
        """The scales of cosines are none of products."""
        fitted(tmp_path / "trace", methods=("tracin-we", "hidden"))
        cosines = TracInSum((TracInWE(normalize="cosine"), TracInLayer("hidden", normalize="cosine")))
        result = ask(tmp_path / "trace", cosines)
        with pytest.raises(ValueError, match="every example has the same influence on itself"):
            result.self_influence()
        plain = TracInSum((TracInWE(), TracInLayer("hidden")))
        expected = quiet().self_influence(trace=tmp_path / "trace", method=plain).sort(descending=True).values
        result.save(tmp_path / "result.safetensors")
        shutil.rmtree(tmp_path / "trace")
        issues = InfluenceResult.load(tmp_path / "result.safetensors").label_issues()
        assert issues.method == "(TracIn-WE) / σ + (TracIn at hidden) / σ"
        found = torch.tensor([each.self_influence for each in issues.issues])
        torch.testing.assert_close(found, expected[: len(found)])


def test_a_log_goes_on_where_a_part_says_nothing_yet(tmp_path):
    """Every token is left out: the words say nothing, and the layer's scores stand alone."""
    method = TracInSum((TracInWE(exclude_tokens=range(40)), TracInLast()))
    rows = logged(fit_and_log(tmp_path, log_method=method))
    assert {row["epoch"] for row in rows} == {0, 1}
    assert all(row["score"] for row in rows)


@given(
    numbers=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    scale=st.sampled_from((1.0, 1e-30, 1e30)),
)
def test_spreads_of_pieces_are_that_of_the_whole(numbers, cut, scale):
    values = torch.tensor(numbers, dtype=torch.float32) * scale
    total = Spread.sum([Spread.of(values[:cut]), Spread.of(values[cut:])])
    exact = values.double()
    assert (total.n, total.low, total.high) == (len(numbers), float(exact.min()), float(exact.max()))
    largest = float(exact.abs().max())
    assert total.mean == pytest.approx(float(exact.mean()), rel=1e-5, abs=1e-6 * largest)
    assert total.deviation == pytest.approx(float(exact.std(correction=0)), rel=1e-4, abs=1e-5 * largest)
