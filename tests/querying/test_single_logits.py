"""A single logit and labels of 0 and 1, whatever their type and shape, are a classifier's; a regression is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, HuggingFace, bert, bert_classifier
from pytorch_lightning.loggers import CSVLogger
from still_fits import Still, build
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from toy import N_TEST, N_TRAIN, fitted, loader, quiet, test_texts, texts

from lightning_tracin import TracInCallback, apply_corrections

FORMS = {
    "int": lambda labels: labels,
    "bool": lambda labels: labels.bool(),
    "float": lambda labels: labels.float(),
    "column of ints": lambda labels: labels[:, None],
    "column of bools": lambda labels: labels[:, None].bool(),
    "column of floats": lambda labels: labels[:, None].float(),
}
NAMES = {0: "ham", 1: "spam"}


class Single(Still):
    """A single logit; learns, and drops nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 1)

    def loss(self, outputs, labels):
        return functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")

    def influence_loss(self, batch):
        ids, labels = batch
        return self.loss(self(ids)[:, 0], labels.reshape(-1).float())

    def influence_label_names(self):
        return NAMES

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class WithoutMixin(Single):
    """Says nothing but what it trains, with logits and labels in columns."""

    influence_loss = None

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        return self.loss(self(ids), labels.reshape(-1, 1).float()).mean()


def of_two(data, form=FORMS["int"]):
    """The toy's texts, each of one of two classes."""
    ids, labels = data.tensors
    return TensorDataset(ids, form(labels.clamp(max=1)))


def fit_of(path, kind=Single, form=FORMS["int"], **options):
    return fitted(path, build(kind), loader(of_two(texts(), form), shuffle=True), trainer={"max_epochs": 3}, **options)


def logits_at(checkpoint, ids, kind=Single):
    module = kind().eval()
    module.load_state_dict(checkpoint.weights())
    with torch.no_grad():
        return module(ids)[:, 0].double()


def said_of(fit, form):
    """All that is said of a fit, for each target."""
    test = loader(of_two(test_texts(), form))
    found = [fit.influence(test, target=target) for target in ("label", "prediction", 1, "spam", ("spam", "ham"))]
    shown = [
        [(each.test, [one.example for one in each.proponents]) for each in result.explanations(k=3)] for result in found
    ]
    tensors = [tensor for result in found for tensor in (result.scores, result.predictions, result.test_texts.labels)]
    tensors += [fit.self_influence(), fit.self_influence(within_class=True)]
    return tensors, (shown, [result.target_names for result in found], fit.label_issues().rows())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A fit with labels that are whole numbers, and what is said of it."""
    fit = fit_of(tmp_path_factory.mktemp("plain") / "trace")
    return fit, said_of(fit, FORMS["int"])


def test_probabilities_are_those_of_the_sigmoid(plain):
    fit, (_, (shown, target_names, rows)) = plain
    (ids, _), (test_ids, _) = (of_two(data()).tensors for data in (texts, test_texts))
    *_, last = fit.callbacks[0].trace.checkpoints
    spam = logits_at(last, test_ids).sigmoid()
    for (example, _), probability in zip(shown[0], spam.tolist(), strict=True):
        assert example.prediction == NAMES[int(probability > 0.5)]
        assert example.confidence == pytest.approx(max(probability, 1 - probability), abs=1e-6)
    assert target_names[1] == [NAMES[int(probability > 0.5)] for probability in spam.tolist()]
    early = torch.stack([logits_at(each, ids).sigmoid() for each in fit.callbacks[0].trace.checkpoints[:2]]).mean(0)
    assert len(rows) == N_TRAIN
    for row in rows:
        probability = float(early[row["train_index"]])
        assert row["predicted_label"] == NAMES[int(probability > 0.5)]
        of_label = probability if row["given_label"] == "spam" else 1 - probability
        assert row["label_score"] == pytest.approx(of_label, abs=1e-6)
        assert row["is_label_issue"] is not None


def test_labels_have_names_on_both_sides(plain):
    _, (_, (shown, _, rows)) = plain
    train, test = (of_two(data()).tensors[1].tolist() for data in (texts, test_texts))
    for of_target in shown:
        assert [example.label for example, _ in of_target] == [NAMES[label] for label in test]
        assert all(each.label == NAMES[train[each.index]] for _, proponents in of_target for each in proponents)
    assert all(row["given_label"] == NAMES[train[row["train_index"]]] for row in rows)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "int"])
def test_whatever_the_type_and_the_shape_of_labels(tmp_path, plain, form):
    tensors, shown = said_of(fit_of(tmp_path / "trace", form=FORMS[form]), FORMS[form])
    for found, expected in zip(tensors, plain[1][0], strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert shown == plain[1][1]


@pytest.mark.parametrize("cache", ["training", "on_demand"])
def test_other_caches(tmp_path, cache):
    rows = fit_of(tmp_path / "trace", form=FORMS["column of floats"], cache=cache).label_issues().rows()
    assert {row["given_label"] for row in rows} == {row["predicted_label"] for row in rows} == {"ham", "spam"}


def test_without_the_mixin(tmp_path):
    form = FORMS["float"]
    result = (fit := fit_of(tmp_path / "trace", WithoutMixin, form)).influence(loader(of_two(test_texts(), form)))
    spam = logits_at(fit.callbacks[0].trace.checkpoints[-1], test_texts().tensors[0], WithoutMixin).sigmoid()
    torch.testing.assert_close(result.predictions[:, 1], torch.maximum(spam, 1 - spam), rtol=1e-5, atol=1e-6)
    assert torch.equal(result.predictions[:, 0], (spam > 0.5).double())
    assert fit.influence(loader(of_two(test_texts(), form)), target="spam").target_names == ["spam"] * N_TEST


@pytest.mark.parametrize("none", [-1.0, torch.nan])
def test_examples_without_a_label_among_others(plain, none):
    fit, (tensors, _) = plain
    ids, labels = of_two(test_texts(), FORMS["column of floats"]).tensors
    labels = labels.clone()
    labels[2] = none
    result = fit.influence(loader(TensorDataset(ids, labels)), target="prediction")
    assert result.test_texts.labels.isnan().nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(result.scores, tensors[3])


def test_flipped_labels_are_found_and_corrected(tmp_path):
    generator = torch.Generator().manual_seed(0)
    right = torch.arange(120) % 2
    ids = 1 + right[:, None] * 19 + torch.randint(0, 18, (120, 6), generator=generator)  # words of each class
    flipped = [3, 20, 41, 70, 88, 103]
    given = right.clone()
    given[flipped] = 1 - given[flipped]
    data = TensorDataset(ids, given[:, None].float())
    train = loader(data, batch_size=10, shuffle=True)
    fit = fitted(tmp_path / "trace", build(Single), train, trainer={"max_epochs": 10}, methods=("tracin-last",))
    rows = fit.label_issues().rows()
    found = {row["train_index"] for row in rows if row["is_label_issue"]}
    assert found == set(flipped)
    for row in rows:
        row["corrected_label"] = row["predicted_label"] if row["is_label_issue"] else ""
    corrected = apply_corrections(data, rows, names=NAMES)
    assert [label.tolist() for _, label in corrected] == right[:, None].float().tolist()


class OfSquares(Single):
    def loss(self, outputs, labels):
        return functional.mse_loss(outputs, labels, reduction="none")


class OfDifferences(Single):
    def loss(self, outputs, labels):
        return functional.smooth_l1_loss(outputs, labels, reduction="none")


class OfSquaresWithoutMixin(WithoutMixin, OfSquares):
    pass


def says_values(fit, test):
    result = fit.influence(test)
    assert result.predictions[:, 1].isnan().all()
    said = logits_at(fit.callbacks[0].trace.checkpoints[-1], test_texts().tensors[0])
    torch.testing.assert_close(result.predictions[:, 0], said, rtol=1e-5, atol=1e-6)
    assert fit.influence(test, target="prediction").target_names == [f"{value:.3g}" for value in said.tolist()]
    with pytest.raises(ValueError, match=r"does regression.* A single output is of two classes where"):
        fit.influence(test, target=1)
    return True


@pytest.mark.parametrize("form", ["int", "float", "column of floats"])
@pytest.mark.parametrize("kind", [OfSquares, OfDifferences, OfSquaresWithoutMixin])
def test_a_regression_of_zeros_and_ones_stays_one(tmp_path, kind, form):
    fit = fit_of(tmp_path / "trace", kind, FORMS[form])
    assert says_values(fit, loader(of_two(test_texts(), FORMS[form])))
    if kind is OfSquares:
        assert {row["predicted_label"] for row in fit.label_issues().rows()} == {None}


class OfHalves(Single):
    """A regression whose loss is none of the usual ones."""

    def loss(self, outputs, labels):
        return (outputs - labels).abs() ** 1.5


def test_a_regression_stays_one_where_a_batch_has_zeros_and_ones_alone(tmp_path):
    ids, labels = texts().tensors
    fit = fitted(tmp_path / "trace", OfHalves(), loader(TensorDataset(ids, labels / 2)), trainer={"max_epochs": 1})
    for form in FORMS.values():
        assert says_values(fit, loader(of_two(test_texts(), form)))


def test_a_module_says_otherwise_by_its_labels(tmp_path):
    class Untold(OfHalves):
        def influence_labels(self, batch):
            return None

    fit = fit_of(tmp_path / "trace", Untold, FORMS["float"])
    assert says_values(fit, loader(of_two(test_texts(), FORMS["float"])))


def hugging_face(path, module, labels):
    """The predictions of a model of transformers, and its logits."""
    data = [{**row, "labels": label} for row, label in zip(FAMILIES["bert-regression"].examples, labels, strict=True)]
    family = replace(FAMILIES["bert-regression"], examples=data)
    fit = fitted(path, module, family.train_loader(), trainer={"max_epochs": 1})
    result = fit.influence(family.test_loader())
    with torch.no_grad():
        batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in family.test_loader()]
        logits = torch.cat([module.eval()(**batch).logits[:, 0] for batch in batches]).double()
    return fit, result, logits


class WithOwnLoss(HuggingFace):
    """Cross-entropies of the single logit of a model that would have squared errors."""

    def influence_loss(self, batch):
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        return functional.binary_cross_entropy_with_logits(logits, batch["labels"].float(), reduction="none")

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()


@pytest.mark.parametrize(
    ("module", "is_column"),
    [
        (lambda: bert_classifier(num_labels=1, problem_type="multi_label_classification"), True),
        (lambda: bert("BertForSequenceClassification", "classifier", WithOwnLoss, num_labels=1), False),
    ],
    ids=["multi-label", "own-loss"],
)
def test_a_model_of_transformers_with_a_single_logit(tmp_path, module, is_column):
    zeros_and_ones = (torch.arange(len(FAMILIES["bert-regression"].examples)) % 2).float()
    labels = zeros_and_ones[:, None] if is_column else zeros_and_ones
    fit, result, logits = hugging_face(tmp_path / "trace", module(), labels)
    positive = logits.sigmoid()
    torch.testing.assert_close(result.predictions[:, 1], torch.maximum(positive, 1 - positive), rtol=1e-5, atol=1e-6)
    assert torch.equal(result.predictions[:, 0], (positive > 0.5).double())
    assert {row["given_label"] for row in fit.label_issues().rows()} == {"0", "1"}
    assert {row["predicted_label"] for row in fit.label_issues().rows()} <= {"0", "1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_regression_of_transformers_stays_one(tmp_path, dtype):
    labels = (torch.arange(len(FAMILIES["bert-regression"].examples)) % 2).to(dtype)
    fit, result, logits = hugging_face(tmp_path / "trace", bert_classifier(num_labels=1), labels)
    torch.testing.assert_close(result.predictions[:, 0], logits, rtol=1e-5, atol=1e-6)
    assert result.predictions[:, 1].isnan().all()
    assert {row["predicted_label"] for row in fit.label_issues().rows()} == {None}


@pytest.mark.parametrize("kind", [Single, OfSquares])
def test_the_log_of_a_validation(tmp_path, kind):
    class Validating(kind):
        def validation_step(self, batch, batch_idx):
            pass

    data = [loader(of_two(each, FORMS["column of floats"])) for each in (texts(), test_texts())]
    callback = TracInCallback(tmp_path / "trace", log_examples=N_TEST, log_k=1, on_error="raise")
    quiet(callbacks=[callback], logger=CSVLogger(tmp_path), max_epochs=1).fit(Validating(), *data)
    (table,) = tmp_path.rglob("*.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert {row["test_label"] for row in rows} == {"ham", "spam"}
    assert {row["confidence"] is None for row in rows} == {kind is OfSquares}
