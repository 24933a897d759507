"""recommend: which method to trust, and TF-IDF, which knows no model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import planted
import pytest
import pytorch_lightning as pl
import torch
from planted import COPIES, EPOCHS, N_TEST, TEST, TRAIN, Learner, build
from torch.utils.data import DataLoader, Subset
from toy import quiet

from lightning_tracin import TracInCallback, TracInLast, TracInRidge, TracInWE
from lightning_tracin.gradients.sites import Site
from lightning_tracin.gradients.texts import Texts
from lightning_tracin.metrics.functional import linear_datamodeling_score
from lightning_tracin.retraining import recommend, stored_outcomes
from lightning_tracin.retraining.candidates import baseline_scores, candidate_methods
from lightning_tracin.retraining.intervals import student
from lightning_tracin.retraining.recommendation import Measured, Recommendation
from lightning_tracin.retraining.recommending import _measured_change
from lightning_tracin.retraining.tf_idf import tf_idf_cosines

METHODS = {"words": TracInWE(normalize="cosine"), "last": TracInLast()}
few = pytest.mark.filterwarnings("ignore:. test examples are looked at")


def test_a_small_lds_weighs(planted_fit, tmp_path):
    trace = planted_fit.callbacks[0].trace
    found = recommend(trace, build, planted.test_loader(), "weigh", methods=METHODS, folder=tmp_path)
    stored = stored_outcomes(tmp_path, seeds=(0,))
    assert found.n_fits == 8 + 4
    assert len(stored.subsets) == 8
    by_name = {each.name: each for each in found.measured}
    assert by_name.keys() == {"words", "last", "same label", "tf-idf"}
    for name, method in METHODS.items():
        scores = planted_fit.influence(planted.test_loader(), method=method).scores
        lds = linear_datamodeling_score(scores, stored.subsets, -stored.losses[:, 0])
        assert by_name[name].value == pytest.approx(float(lds.mean), abs=1e-5)
        assert by_name[name].error == pytest.approx(float(lds.se_subsets), abs=1e-5)
        assert by_name[name].width == pytest.approx(2.365 * by_name[name].error, rel=1e-3)  # 8 halves
        assert by_name[name].method == method
    assert [each.value for each in found.measured] == sorted((each.value for each in found.measured), reverse=True)
    assert 0 < found.ceiling <= 1
    assert "Perfect scores would reach" in str(found)


@few
def test_a_small_deletion_explains(planted_fit, tmp_path):
    trace = planted_fit.callbacks[0].trace.path
    asked = {"methods": METHODS, "k": COPIES, "folder": tmp_path}
    recommend(trace, build, planted.test_loader(), "explain", 2, **asked)
    found = recommend(trace, build, planted.test_loader(), "explain", N_TEST, **asked)
    assert len([*tmp_path.glob("*.safetensors")]) == found.n_fits  # the fits of two test examples were among them
    by_name = {each.name: each for each in found.measured}
    assert found.best.name == "words"
    assert by_name["last"].is_behind
    assert by_name["same label"].is_behind
    assert by_name["words"].value == pytest.approx(by_name["tf-idf"].value)  # both find the copies
    assert not by_name["tf-idf"].is_behind
    assert not found.is_clear
    assert found.what == "fall of the target's probability without the 4 strongest proponents"
    assert found.sentence() == (
        "Use 'words': it is better than all other methods, beyond what chance makes of that many. It cannot be "
        "told from 'tf-idf' (no model)."
    )


@few
def test_no_two_test_examples_share_a_fit(planted_fit, planted_result, tmp_path):
    """Or the chance of one fit would count as that of several: each has its own base, and its own random removal."""
    trace, options = planted_fit.callbacks[0].trace, {"k": COPIES, "folder": tmp_path}
    rows = [2, 0, 2, 1]  # one of them twice
    methods = {"words": METHODS["words"]}
    found = recommend(trace, build, planted.test_loader(), methods=methods, test_indices=rows, **options)
    chosen = planted_result.proponents(COPIES).indices
    falls = []
    for seed, row in enumerate((2, 0, 1)):
        stored = stored_outcomes(tmp_path, seeds=(seed,))
        assert len(stored.subsets) == 3  # all, without the proponents, which are the nearest, without four of the label
        own = stored.log_probabilities[:, 0, row, int(TEST.tensors[1][row])].exp()
        kept = torch.ones(len(TRAIN), dtype=torch.bool).scatter_(0, chosen[row], False)
        falls.append(float(own[stored.subsets.all(1)] - own[(stored.subsets == kept).all(1)]))
    assert found.n_fits == 3 * 3
    assert found.best.n == 3
    assert min(falls) > 0
    assert found.best.value == pytest.approx(sum(falls) / 3, abs=1e-6)
    assert found.best.error == pytest.approx(float(torch.tensor(falls).std()) / 3**0.5, abs=1e-6)


class Value(Learner):
    """Says a value, not a class, and shows no label: 2 of the planted words, 0 of the others."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 1)

    def influence_loss(self, batch):
        return (self(batch[0])[:, 0] - 2.0 * (batch[0][:, 0] >= 30)) ** 2

    def influence_labels(self, batch):
        return None


def build_value(indices, seed):
    return Value(), build(indices, seed)[1]


@few
def test_without_its_causes_the_loss_of_a_value_rises(tmp_path):
    pl.seed_everything(0, verbose=False)
    module, loader = build_value(range(len(TRAIN)), 0)
    callback = TracInCallback(tmp_path / "trace", dtype="float32", methods=("tracin-we",))
    quiet(max_epochs=EPOCHS, callbacks=[callback]).fit(module, loader)
    methods = {"words": METHODS["words"]}
    options = {"methods": methods, "k": COPIES, "test_indices": [0, 1], "folder": tmp_path / "runs"}
    found = recommend(tmp_path / "trace", build_value, planted.test_loader(), **options)
    stored = stored_outcomes(tmp_path / "runs", seeds=(1,))
    losses = stored.losses[:, 0, 1]
    without_copies = (~stored.subsets).sum(1).eq(COPIES) & ~stored.subsets[:, 4:8].any(1)  # what is planted
    assert float(losses[without_copies] - losses[stored.subsets.all(1)]) > 0.5  # nothing is known of its word
    assert found.best.value > 0.5
    assert found.what == "rise of the target's loss without the 4 strongest proponents"
    assert "fall" not in str(found)
    assert {each.name for each in found.measured} == {"words", "random", "tf-idf"}  # there is no label to share
    assert "Random examples stand in for those of the same label." in found.notes


def test_one_test_example_is_refused_and_few_are_warned_of(planted_fit, monkeypatch):
    trace, refused = planted_fit.callbacks[0].trace, "needs at least 2 different test examples, but got 1"
    for test, options in (
        (DataLoader(Subset(TEST, [1])), {}),
        (planted.test_loader(), {"test_indices": [3]}),
        (planted.test_loader(), {"test_indices": [3, 3]}),
    ):
        with pytest.raises(ValueError, match=refused):
            recommend(trace, build, test, methods=[TracInWE()], **options)
    monkeypatch.setattr("lightning_tracin.retraining.recommending._explained", lambda *_: "warned")
    with pytest.warns(UserWarning, match="3 test examples are looked at: below 8 it is mostly chance"):
        assert recommend(trace, build, planted.test_loader(), "explain", 3, methods=[TracInWE()], k=9) == "warned"


def measured(name, value, behind, error, method=None, n=100):
    return Measured(name, method, value, 0.05, behind, error, n)


def test_what_is_clear_of_one_may_be_chance_of_many():
    stats = pytest.importorskip("scipy.stats")
    for n, together in ((2, 1), (8, 1), (8, 10), (9, 3), (20, 10), (101, 7)):
        assert student(n, together) == pytest.approx(stats.t.ppf(1 - 0.025 / together, n - 1), rel=1e-6)
    alone = measured("a", 0.6, 0.13, 0.05, TracInWE(), n=8)  # 2.6 standard errors
    assert alone.is_behind
    assert not replace(alone, together=10).is_behind  # 4.03 are needed
    assert replace(alone, value=0.19, together=10).is_positive is False


def test_ten_equal_methods_are_called_different_in_one_of_twenty_draws():
    generator = torch.Generator().manual_seed(0)
    results = dict.fromkeys([f"m{number}" for number in range(10)], SimpleNamespace(method=TracInWE()))
    told = by_one = 0
    for _ in range(200):
        shared = torch.randn(20, 1, generator=generator)
        values = 0.1 + 0.1 * (shared + torch.randn(20, 10, generator=generator))
        changes = {name: values[:, number] for number, name in enumerate(results)}
        best = max(changes, key=lambda name: float(changes[name].mean()))
        found = [_measured_change(name, changes, best, results) for name in changes if name != best]
        told += any(each.is_behind for each in found)
        by_one += any(each.behind > each.behind_width for each in found)
    assert told <= 0.15 * 200
    assert by_one >= 0.4 * 200


def test_what_cannot_be_told_is_said():
    best, near = measured("a", 0.6, 0.0, 0.0, TracInWE()), measured("b", 0.5, 0.1, 0.06, TracInLast())
    far = measured("c", 0.2, 0.4, 0.06, TracInLast())
    unclear = Recommendation("weigh", "LDS", [best, near, far], 12)
    assert unclear.tied == [near]
    assert "'a' has the highest value, but cannot be told from 'b' by these retrainings" in unclear.sentence()
    clear = Recommendation("weigh", "LDS", [best, far, measured("same label", 0.1, 0.5, 0.1)], 12)
    use = "Use 'a': it is better than all other methods, beyond what chance makes of that many."
    assert clear.is_clear
    assert clear.sentence() == use
    level = Recommendation("weigh", "LDS", [best, measured("tf-idf", 0.55, 0.05, 0.1), far], 12)
    assert level.sentence() == f"{use} It cannot be told from 'tf-idf' (no model)."
    assert not level.is_clear
    assert "'a' is the only method." in Recommendation("weigh", "LDS", [best], 12).sentence()


@pytest.mark.parametrize(
    ("value", "baseline", "above"),
    [
        (-0.01, None, "0"),
        (0.08, None, "0"),  # 1.6 standard errors
        (0.6, measured("same label", 0.9, -0.3, 0.1), "'same label'"),
        (0.6, measured("random", 0.5, 0.1, 0.1), "'random'"),
        (0.6, measured("tf-idf", 0.9, -0.3, 0.1), "'tf-idf'"),
    ],
    ids=["below 0", "level with 0", "behind the label", "level with chance", "behind tf-idf"],
)
def test_what_is_not_above_chance_is_not_recommended(value, baseline, above):
    best, far = measured("a", value, 0.0, 0.0, TracInWE()), measured("c", value - 0.5, 0.5, 0.06, TracInLast())
    found = Recommendation("explain", "fall", [best, *([baseline] if baseline else []), far], 12)
    assert not found.is_clear
    assert found.sentence() == (
        f"No method can be recommended: the best, 'a', is not above {above} by these retrainings. Run more, or trust "
        "none."
    )


def test_of_few_test_examples_student_tells_what_is_clear():
    """Two standard errors of three differences are passed by chance in one of five draws, not one of twenty."""
    best = torch.tensor([0.30, 0.32, 0.34])
    others = {"near": best - torch.tensor([0.02, 0.06, 0.10]), "far": best - torch.tensor([0.05, 0.06, 0.07])}
    changes, results = {"best": best, **others}, {"best": SimpleNamespace(method=None)}
    near, far = (_measured_change(name, changes, "best", results) for name in others)
    assert near.behind == pytest.approx(far.behind) == pytest.approx(0.06, abs=1e-6)
    assert near.behind_error == pytest.approx(0.04 / 3**0.5, abs=1e-6)  # 2.6 of them
    assert near.behind_width == pytest.approx(4.303 * 0.04 / 3**0.5, abs=1e-5)  # two degrees of freedom
    assert not near.is_behind
    assert far.is_behind
    shared = torch.tensor([0.5, -0.5, 0.1])  # what the fits with nothing left out say more or less
    moved = {name: each + shared for name, each in changes.items()}
    again = _measured_change("far", moved, "best", results)
    assert again.behind_error == pytest.approx(far.behind_error, abs=1e-6)
    assert again.error > 5 * far.error  # of the fall itself it is a part


def test_tables_and_charts():
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("Agg")
    best = measured("a", 0.6, 0.0, 0.0, TracInWE())
    found = Recommendation("weigh", "LDS", [best, measured("same label", 0.2, 0.4, 0.06)], 12)
    assert found.to_pandas().behind.tolist() == [0.0, 0.4]
    assert "a           0.60 ± 0.10 " in str(found)  # 1.96 standard errors
    facts = {"value": 0.2, "error": 0.05, "behind": 0.4, "behind_error": 0.06}
    assert found.rows()[1] == {"name": "same label", "method": None, **facts}
    _, ax = found.plot()
    assert [each.get_text() for each in ax.get_yticklabels()] == ["a", "same label"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "why"}, "question must be 'explain' or 'weigh'"),
        (
            {"question": "weigh", "retrainings": 3},
            "retrainings must be a whole number of at least 4 to weigh, where 8",
        ),
        ({"retrainings": 1}, "retrainings must be a whole number of at least 2"),
        ({"retrainings": 8.5}, "retrainings must be .* but got 8.5"),
        ({"k": True}, "k must be a whole number from 1 to 55, as 56 examples were trained on, but got True"),
        ({"methods": []}, "no candidate methods"),
        ({"k": 99, "methods": [TracInWE()]}, "k must be a whole number from 1 to 55"),
    ],
    ids=["question", "weigh", "explain", "part", "truth", "methods", "k"],
)
@few
def test_wrong_questions_are_refused(planted_fit, options, message):
    with pytest.raises(ValueError, match=message):
        recommend(planted_fit.callbacks[0].trace, build, planted.test_loader(), **options)


@few
def test_the_trace_of_another_training_set_is_refused(planted_fit, trace):
    with pytest.raises(ValueError, match="is of another"):  # the toy's, not the planted task's
        recommend(trace, build, planted.test_loader(), methods=[TracInWE()], k=2)


def test_candidates_are_what_the_trace_has():
    words = Site("words", "tracin-we", "embedding", "words")
    last = Site("linear-0", "tracin-last", "head", "factors", is_last=True, has_bias=True)
    inner = [Site(f"linear-{at}", f"conv.{at}", f"conv.{at}", "factors", has_bias=True) for at in (1, 2)]
    assert candidate_methods([], 20) == {}
    alone = candidate_methods([words], 20)
    assert [*alone] == ["words", "words, cosine", "words, ridge"]
    assert alone["words, cosine"] == TracInWE(normalize="cosine")
    assert alone["words, ridge"] == TracInRidge(TracInWE(normalize="cosine"), residual=0)
    of_all = candidate_methods([words, last, *inner], 10_000)
    assert len(of_all) == 8
    both = of_all["words and layers, K-FAC"]
    assert both.mix == (1.0, 1 / 3, 1 / 3, 1 / 3)
    assert [part.precondition for part in both.parts] == [None, "kfac", "kfac", "kfac"]
    assert {part.weights for part in both.parts} == {"residual"}
    assert of_all["words and layers, ridge"] == TracInRidge(both, landmarks=4000)
    matrices = [replace(each, shape="matrix") for each in inner]
    without_factors = candidate_methods([words, last, *matrices], 20)
    assert "layers, K-FAC" not in without_factors  # which it needs factors for
    cosines = without_factors["words and layers, ridge"].method
    assert [part.precondition for part in cosines.parts] == [None] * 4
    components = [replace(each, shape="matrix", rank=(128, 32), has_bias=False) for each in inner]
    of_components = candidate_methods([words, last, *components], 20)  # which cosines of whole gradients cannot use
    assert of_components["words and layers, ridge"] == TracInRidge(both)
    with_uncommon = candidate_methods([words, last, *inner], 20, uncommon=True)
    added = with_uncommon.keys() - of_all.keys()
    assert added == {"uncommon words, ridge", "uncommon words and layers, ridge"}
    for name in added:
        uncommon, usual = with_uncommon[name], with_uncommon[name.removeprefix("uncommon ")]
        assert [part.excluded.words for part in parts_of(uncommon) if isinstance(part, TracInWE)] == [("common",)]
        assert parts_of(uncommon)[1:] == parts_of(usual)[1:]
        assert uncommon.residual == usual.residual


def parts_of(ridge):
    return [summand.method for summand in ridge.method.summands]


def test_tf_idf_is_that_of_the_books():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 12, (length,), generator=generator).tolist() for length in (5, 1, 9, 4, 7, 3)]
    train, test = texts[:4], texts[4:]
    found = tf_idf_cosines(as_texts(test), as_texts(train))

    def vector(text):
        counts = Counter(text)
        held = {token: sum(token in other for other in train) for token in counts}
        weighted = {token: n * (math.log((1 + len(train)) / (1 + held[token])) + 1) for token, n in counts.items()}
        length = math.sqrt(sum(each**2 for each in weighted.values()))
        return {token: each / length for token, each in weighted.items()}

    for row, one in enumerate(test):
        for column, other in enumerate(train):
            first, second = vector(one), vector(other)
            expected = sum(first[token] * second.get(token, 0) for token in first)
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-6)


def as_texts(texts, labels=None):
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.long)
    owners = torch.tensor([number for number, text in enumerate(texts) for _ in text], dtype=torch.long)
    return Texts(len(texts), owners, ids, torch.tensor(labels or [math.nan] * len(texts), dtype=torch.float64))


def test_baselines_know_labels_where_there_are_some():
    train, test = as_texts([[1, 2], [1, 3]], [0, 1]), as_texts([[1, 2]], [1])
    found = baseline_scores(test, train)
    assert found["same label"].tolist() == [[0, 1]]
    assert torch.equal(found["tf-idf"], tf_idf_cosines(test, train) * torch.tensor([-1, 1]))
    assert baseline_scores(as_texts([[1]]), train).keys() == {"tf-idf"}
    undrawn = as_texts([[1, 2], [1, 3], [1, 2]], [0, 1, torch.nan])
    found = baseline_scores(as_texts([[1, 2], [1]], [1, torch.nan]), undrawn)
    assert found["same label"].tolist() == [[0, 1, 0], [0, 0, 0]]
    cosines = tf_idf_cosines(as_texts([[1, 2], [1]]), undrawn)
    assert torch.equal(found["tf-idf"], cosines * torch.tensor([[-1, 1, 0], [0, 0, 0]]))
    assert baseline_scores(test, as_texts([[1, 2], [1, 3]], [1, 1])).keys() == {"tf-idf"}  # no label to tell by
    assert tf_idf_cosines(as_texts([[1], []]), train)[1].tolist() == [0, 0]
