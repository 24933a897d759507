"""Logged validations by another method than the default, and with raw texts."""

from __future__ import annotations

import pytest
import torch
from logged_fits import assert_scores, examples_of, fit, logged
from spelled_fits import TEST, TRAIN, Spelled, batches
from tokenizers import normalizers
from toy import EPOCHS, Toy, quiet

from lightning_tracin import TracInCallback, TracInLast, TracInLayer, TracInRidge, TracInSum, TracInWE


class Validated(Spelled):
    def validation_step(self, batch, batch_idx):
        pass


def fit_spelled(folder, module=None, **options):
    options = {"train": batches(TRAIN, shuffle=True), "val": batches(TEST), "log_examples": len(TEST), **options}
    return fit(folder, module or Validated(), **options)


METHODS = [
    TracInWE(normalize="cosine", precondition="adam", exclude_tokens=("special", "common", "cup")),
    TracInSum((TracInWE(exclude_tokens="special"), TracInLast(normalize="cosine"))),
    TracInRidge(TracInWE(exclude_tokens="special", normalize="cosine")),
    "tracin-last",
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_log_says_what_influence_says_after_the_fit(tmp_path, method):
    trainer = fit_spelled(tmp_path, log_method=method)
    rows = [row for row in logged(trainer) if row["epoch"] == EPOCHS - 1]
    result = quiet().influence(batches(TEST), Validated(), trace=tmp_path / "trace", method=method)
    assert_scores(rows, result.scores)
    named = {word.split(" ")[0] for row in rows for word in row["words"].split(", ")}
    assert named.isdisjoint({"[CLS]", "the", "cup"} if method is METHODS[0] else {"[CLS]"})
    for of in result.explanations([index for _, index in examples_of(rows)], k=3):
        own = [row for row in rows if row["test_index"] == of.test.index]
        for row, each in zip(own, (*of.proponents, *of.opponents), strict=True):
            assert row["words"] == ", ".join(f"{word} {term:+.3g}" for word, term in each.strongest_words())


RAW = [text.replace(" ##", "").upper() for text in TRAIN]


@pytest.mark.parametrize("both", [False, True], ids=["of the training set", "of both"])
def test_texts_are_logged_as_they_were_written(tmp_path, both):
    val = [text.replace(" ##", "").upper() for text in TEST]
    trainer = fit_spelled(tmp_path, LowerCased(), log_texts={"train": RAW, "val": val} if both else RAW)
    rows = logged(trainer)
    assert rows
    for row in rows:
        assert row["train_text"] == RAW[row["train_index"]]
        assert row["test_text"] == (val[row["test_index"]] if both else val[row["test_index"]].lower())


class LowerCased(Validated):
    """Its tokenizer lowers the case, so that only the raw texts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def test_texts_of_other_validation_examples_are_not_shown(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("lightning_tracin.recording.validation_log.rank_zero_warn", warned.append)
    trainer = fit_spelled(tmp_path, log_texts={"val": TEST[:2]})
    assert len(warned) == 1
    assert 'log_texts has 2 texts of "val"' in warned[0]
    assert {row["test_text"] for row in logged(trainer)} <= {text.replace(" ##", "") for text in TEST}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_method": TracInLayer("hidden")}, r"did not record the layer of TracInLayer.*among the methods"),
        ({"log_method": TracInWE(top_words=5), "top_words": 3}, "keeps 3 words of each example"),
        ({"log_method": TracInWE(exclude_tokens="Cup")}, "no token .* prints so. Near it are: 'cup'"),
        ({"log_texts": TRAIN[:3]}, f"must have a text for each of {len(TRAIN)} training examples, but has 3"),
    ],
    ids=str,
)
def test_what_cannot_be_logged_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit_spelled(tmp_path, **options)
    assert not (tmp_path / "trace").exists()


def test_what_needs_a_tokenizer_or_adam_is_refused_without(tmp_path):
    class Plain(Toy):
        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    for options, message in (
        ({"log_texts": ["a"] * 20}, "needs the fast tokenizer"),
        ({"log_method": TracInWE(exclude_tokens=["special"])}, "has a tokenizer"),
        ({"log_method": TracInWE(precondition="adam")}, "no optimizer of the fit is of the Adam family"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, Plain(), **options)
    assert logged(fit(tmp_path, Plain(), log_method=TracInWE(exclude_tokens=["common"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_method": "tracin"}, "method must be one of"),
        ({"log_texts": "a text"}, "log_texts must be the texts of the training set"),
        ({"log_texts": {"test": []}}, "log_texts must be the texts of the training set"),
        ({"log_examples": 0, "log_method": "tracin-we"}, "go with log_examples"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TracInCallback(**{"log_examples": 2, **options})
