"""What metrics refuse, and what they warn of: the argument by name, what was given, and what was expected."""

from __future__ import annotations

import pytest
import torch

from lightning_tracin import metrics as M
from lightning_tracin.metrics import functional as F

SCORES = torch.linspace(-1, 1, 60).view(4, 15).sin()
SUBSETS = (torch.arange(9 * 15).view(9, 15) * 7 % 3) == 0
OUTPUTS = torch.linspace(0, 5, 36).view(9, 4).cos()
LABELS, TESTS = torch.arange(15) % 2, torch.arange(4) % 2
NOISY = torch.arange(15) < 4
VALUES = SCORES[0]
CHANGES = SCORES[:, :6].view(4, 2, 3)
SAID = torch.zeros(4, 3, dtype=torch.long)
NAN = SCORES.clone()
NAN[1, 2] = torch.nan
INFINITE = OUTPUTS.clone()
INFINITE[0, 0] = torch.inf

REFUSED = {
    "NaN in scores": (
        lambda: F.linear_datamodeling_score(NAN, SUBSETS, OUTPUTS),
        "`scores` expected to be finite.* 1 val",
    ),
    "infinite outputs": (
        lambda: F.linear_datamodeling_score(SCORES, SUBSETS, INFINITE),
        "`outputs` expected to be finite",
    ),
    "transposed scores": (
        lambda: F.linear_datamodeling_score(SCORES.T, SUBSETS, OUTPUTS),
        "`scores` expected to have the 15 training examples of `subsets`, but got 4",
    ),
    "transposed outputs": (
        lambda: F.linear_datamodeling_score(SCORES, SUBSETS, OUTPUTS.T),
        "`outputs` expected to have the 9 subsets of `subsets`, but got 4",
    ),
    "other tests": (
        lambda: F.linear_datamodeling_score(SCORES[:3], SUBSETS, OUTPUTS),
        "`outputs` expected to have the 3 test examples of `scores`, but got 4",
    ),
    "indices for subsets": (
        lambda: F.linear_datamodeling_score(SCORES, torch.arange(135).view(9, 15), OUTPUTS),
        "`subsets` expected to be a mask of 0 and 1, but got the value 2: of indices make a mask first",
    ),
    "one row of scores": (
        lambda: F.top_k_cardinality(VALUES),
        r"`scores` expected .* \(n_test, n_train\), but got \(15,\)",
    ),
    "no test example": (lambda: F.top_k_cardinality(SCORES[:0]), r"`scores` expected .* but got \(0, 15\)"),
    "other classes": (
        lambda: F.linear_datamodeling_score(SCORES, SUBSETS, OUTPUTS, LABELS[:5]),
        "`within` expected to have the 15 training examples",
    ),
    "seeds that come and go": (
        lambda: [
            metric.update(SCORES, each)
            for metric in [M.LinearDatamodelingScore(SUBSETS)]
            for each in (OUTPUTS, torch.stack((OUTPUTS, OUTPUTS), dim=1))
        ],
        "`outputs` expected to have the 1 seeds of the batches before, but got 2",
    ),
    "removed twice": (
        lambda: F.leave_one_out_correlation(SCORES, OUTPUTS, torch.zeros(9, dtype=torch.long)),
        "`removed` expected to be 3 or more different indices below 15.* got 1 different ones from 0 to 0",
    ),
    "removed from elsewhere": (
        lambda: F.leave_one_out_correlation(SCORES, OUTPUTS, torch.arange(8, 17)),
        "from 8 to 16",
    ),
    "two removed": (lambda: F.leave_one_out_correlation(SCORES[:, :2], OUTPUTS[:2]), "3 or more different indices"),
    "models without an index": (
        lambda: F.leave_one_out_correlation(SCORES, OUTPUTS),
        "`outputs` expected to have the 15 removed training examples, but got 9",
    ),
    "changes of other ks": (
        lambda: F.deletion_curve(CHANGES, (1, 2)),
        "`changes` expected to have the 2 numbers.* got 3",
    ),
    "falling ks": (lambda: F.deletion_curve(CHANGES, (3, 2, 1)), r"`ks` expected to be growing .* but got \[3, 2, 1\]"),
    "nothing removed": (
        lambda: F.deletion_curve(CHANGES, (0, 1, 2)),
        r"ks\[0\] must be a whole number of at least 1, but got 0",
    ),
    "no ks": (lambda: M.DeletionCurve(()), r"`ks` expected .* but got \[\]"),
    "parts of examples": (
        lambda: M.Brittleness((0.5, 1)),
        r"ks\[0\] must be a whole number of at least 0, but got 0.5",
    ),
    "other references": (lambda: F.brittleness(SAID, TESTS[:2], (1, 2, 3)), "`reference` expected to have the 4 test"),
    "percent": (lambda: M.TailPatch(level=95), "level must be .* above 0 and below 1, but got 95"),
    "no resample": (
        lambda: M.TailPatch(resamples=0),
        "resamples must be a whole number of at least 1, but got 0",
    ),
    "all noise": (lambda: F.mislabel_detection_auroc(VALUES, NOISY | True), "to name some of the 15 .* but got 15 of"),
    "no noise": (lambda: F.mislabel_detection_curve(VALUES, NOISY & False), "to name some of the 15 .* but got 0 of"),
    "other noise": (
        lambda: F.noise_detection_rate(VALUES, NOISY[:9]),
        "`mislabelled` expected to have the 15 .* got 9",
    ),
    "indices of noise": (
        lambda: M.MislabelDetectionAUROC().update(VALUES, torch.arange(15)),
        "`mislabelled` expected to be a mask",
    ),
    "all that is looked at": (lambda: M.NoiseDetectionRate(at=1.5), "at must be .* above 0 and below 1, but got 1.5"),
    "too many": (lambda: F.class_detection(SCORES, LABELS, TESTS, k=16), "k must be .* from 1 to 15, but got 16"),
    "none": (lambda: M.RecallAtK(k=0), "k must be a whole number of at least 1, but got 0"),
    "labels of others": (lambda: F.class_detection(SCORES, LABELS[:9], TESTS), "`train_labels` expected .* got 9"),
    "relevant to others": (lambda: F.recall_at_k(SCORES, SCORES[:, :9] > 0), "`relevant` expected to have the 15"),
    "another way to count": (
        lambda: M.RecallAtK(counting="all"),
        '`counting` expected to be "any" or "share".* \'all\'',
    ),
    "another model's examples": (
        lambda: F.model_randomization(SCORES, SCORES.T),
        r"`randomized` expected to be of shape \(4, 15\), as `scores`, but got \(15, 4\)",
    ),
    "no word": (lambda: F.common_word_share(SAID - 1, LABELS), "`words` expected to hold a word"),
    "no gradient": (lambda: F.cancellation_effect(SCORES * 0), "`gradients` expected to hold a gradient that is not 0"),
    "another layer": (
        lambda: M.CancellationEffect(9).update(SCORES),
        "`gradients` expected to have the 9 parameters of `n_parameters`, but got 15",
    ),
}

WRONG_TYPES = {
    "a list": (lambda: F.top_k_cardinality([[0.1, 0.2]]), "`scores` expected to be a tensor .* but got list"),
    "whole scores": (lambda: F.top_k_cardinality(SAID), "`scores` expected to be a tensor of floating.* torch.int64"),
    "soft subsets": (
        lambda: M.LinearDatamodelingScore(SCORES),
        "`subsets` expected to be .* of bool, but got torch.float32",
    ),
    "names of classes": (
        lambda: M.ClassDetection(["a", "b"]),
        "`train_labels` expected to be a tensor of integers.* list",
    ),
    "probabilities": (lambda: F.brittleness(CHANGES, TESTS, (1, 2, 3)), "`predictions` expected to be .* of integers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_values_are_refused(what):
    wrong, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_types_are_refused(what):
    wrong, message = WRONG_TYPES[what]
    with pytest.raises(TypeError, match=message):
        wrong()


@pytest.mark.parametrize(
    "constant",
    [
        lambda flat: F.class_detection(flat, LABELS, TESTS),
        lambda flat: F.top_k_cardinality(flat),
        lambda flat: F.recall_at_k(flat, SCORES > 0),
        lambda flat: F.model_randomization(flat, SCORES),
        lambda flat: F.leave_one_out_correlation(flat, OUTPUTS, torch.arange(9)).mean,
    ],
    ids=["class", "cardinality", "recall", "randomised", "leave one out"],
)
def test_constant_scores_warn(constant):
    flat = SCORES.clone()
    flat[1] = 0.3
    with pytest.warns(UserWarning, match="`scores` expected to vary over the .* but got 1 of 4 test examples"):
        assert constant(flat).isfinite()


def test_constant_outputs_warn():
    outputs = OUTPUTS.clone()
    outputs[:, 2] = -0.1
    with pytest.warns(UserWarning, match="`outputs` expected to vary over the removed examples, but got 1 of 4"):
        assert F.leave_one_out_correlation(SCORES, outputs, torch.arange(9)).per_test[2] == 0


def test_few_removed_examples_warn():
    with pytest.warns(UserWarning, match="of 7 removed examples: below 8 it is mostly chance"):
        F.leave_one_out_correlation(SCORES, OUTPUTS[:7], torch.arange(7))


def test_leave_one_out_at_any_scale():
    """Late in training one example changes the log-probability by 1e-9."""
    tiny = F.leave_one_out_correlation(SCORES * 1e-9, -3 + OUTPUTS.double() * 1e-6, torch.arange(9))
    whole = F.leave_one_out_correlation(SCORES, OUTPUTS, torch.arange(9))
    torch.testing.assert_close(tiny, whole, rtol=1e-5, atol=1e-5)


def test_nothing_to_compute_from():
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="No samples"):
        M.DeletionCurve((1, 2)).compute()
