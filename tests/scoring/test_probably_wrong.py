"""Which labels are called probably wrong: by the definition, and none where a model hardly fits."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch.utils.data import TensorDataset
from toy import Toy, fitted, loader, texts

from lightning_tracin.report.label_issues import LabelIssues
from lightning_tracin.scoring.label_review import probably_wrong


def log_odds(probability):
    return float(torch.tensor(probability, dtype=torch.float64).logit())


def by_the_definition(probabilities, labels):
    """The same, one example at a time."""
    rows, labels = probabilities.double().tolist(), labels.tolist()
    standings, suspected = {}, []
    for label in set(labels):
        own = [row[label] for row, given in zip(rows, labels, strict=True) if given == label]
        others = [row[label] for row, given in zip(rows, labels, strict=True) if given != label]
        if not others:
            continue
        threshold = (statistics.mean(own) + statistics.mean(others)) / 2
        above, others_above = (statistics.mean(each >= threshold for each in side) for side in (own, others))
        if above - others_above <= 0.5:
            continue
        median = statistics.median_low(map(log_odds, own))
        for index, (row, given) in enumerate(zip(rows, labels, strict=True)):
            if given == label:
                standings[index] = (log_odds(row[label]) - median) / (median - log_odds(threshold))
                if row[label] < threshold and max(range(len(row)), key=row.__getitem__) != label:
                    suspected.append(index)
    for cut in sorted(-standings[index] for index in suspected):
        called = [index for index in suspected if -standings[index] >= cut]
        mirrored = [index for index, standing in standings.items() if standing >= cut]
        if 1 + len(mirrored) <= len(called) / 2:
            return sorted(called)
    return []


def said(labels, *, sure, spread, n_classes, generator):
    """Probabilities of a model that is more or less sure of each label."""
    logits = spread * torch.randn(len(labels), n_classes, generator=generator)
    logits[torch.arange(len(labels)), labels] += sure
    return logits.softmax(1)


@pytest.mark.parametrize("n_classes", [2, 3, 6])
@pytest.mark.parametrize("sure", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_labels_are_called_wrong_as_defined(n_classes, sure, share):
    generator = torch.Generator().manual_seed(n_classes)
    right = torch.randint(n_classes, (200,), generator=generator)
    probabilities = said(right, sure=sure, spread=1.0, n_classes=n_classes, generator=generator)
    flipped = torch.rand(200, generator=generator) < share
    given = torch.where(flipped, (right + 1) % n_classes, right)
    found = probably_wrong(probabilities, given).nonzero()[:, 0].tolist()
    assert found == by_the_definition(probabilities, given)
    if sure == 0:  # at chance
        assert found == []
    if sure == 5:  # nearly all is learned
        wrong = set(flipped.nonzero()[:, 0].tolist())
        assert len(wrong & set(found)) >= 0.9 * len(wrong)
        assert len(set(found) - wrong) <= len(found) / 4


def test_a_class_of_its_own_is_judged_by_itself():
    """One class is told from others, with two wrong labels; of the other two, which are mixed up, nothing is said."""
    generator = torch.Generator().manual_seed(0)
    right = torch.arange(120) % 3
    logits = 0.3 * torch.randn(120, 3, generator=generator)
    logits[:, 0] += torch.where(right == 0, 3.0, -3.0)
    given = right.clone()
    given[[1, 2]] = 0
    assert probably_wrong(logits.softmax(1), given).nonzero()[:, 0].tolist() == [1, 2]


def test_one_label_for_all_and_none_at_all():
    probabilities = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert not probably_wrong(probabilities, torch.zeros(3, dtype=torch.long)).any()
    assert not probably_wrong(probabilities[:0], torch.zeros(0, dtype=torch.long)).any()


@pytest.mark.parametrize("epochs", [1, 3])
def test_nothing_is_called_wrong_where_a_model_hardly_fits(tmp_path, epochs):
    """Random texts: at most as many labels are said as by chance or a little more."""
    data = TensorDataset(texts(60).tensors[0], texts(60).tensors[1].clamp(max=1))
    fit = fitted(tmp_path / "trace", Toy(), loader(data, shuffle=True), trainer={"max_epochs": epochs})
    issues = fit.label_issues()
    assert issues.agreement < 0.75
    assert issues.n_issues == 0
    assert {each.is_label_issue for each in issues.issues} == {False}
    right = [row["given_label"] == row["predicted_label"] for row in issues.rows()]
    assert issues.agreement == pytest.approx(statistics.mean(right))
    assert f"No label can be called probably wrong; the model says the label of {issues.agreement:.0%}\n" in str(issues)


def test_what_is_said_of_how_many_are_wrong():
    said = [LabelIssues([], 9, n, "TracIn-Last", agreement).finding for n, agreement in ((3, 0.9), (1, 0.9), (2, None))]
    assert said == [
        "3 labels are probably wrong; the model says the label of 90%",
        "1 label is probably wrong; the model says the label of 90%",
        "2 labels are probably wrong",
    ]
    assert LabelIssues([], 9, None, "TracIn-Last").finding == ""


@pytest.mark.parametrize(
    ("agreement", "said"), [(1.0, "100%"), (0.9996, "99.9%"), (0.995, "99.5%"), (0.99, "99%"), (0.124, "12%")]
)
def test_not_all_is_called_all_but_all(agreement, said):
    assert LabelIssues([], 9, 1, "TracIn-Last", agreement).finding.endswith(f"says the label of {said}")
