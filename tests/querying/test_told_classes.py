"""What a classifier says is taken from outputs whose losses are those of classes, and from no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from toy import CLASSES, Toy, fitted, loader, test_texts, texts

from lightning_tracin.gradients.outputs import tell_classes

N, WEIGHTS = 40, torch.tensor([0.2, 1.0, 5.0])


def focal(logits, labels):
    of_label = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -WEIGHTS[labels] * (1 - of_label.exp()) ** 2 * of_label


def per_class(loss):
    return lambda logits, labels: loss(logits, functional.one_hot(labels, CLASSES).float(), reduction="none").sum(1)


def cross_entropy(**options):
    return lambda logits, labels: functional.cross_entropy(logits, labels, reduction="none", **options)


def of_prototypes(projected, labels):
    prototypes = torch.randn(CLASSES, projected.shape[1], generator=torch.Generator().manual_seed(3))
    return cross_entropy()(
        5 * functional.normalize(projected, dim=1) @ functional.normalize(prototypes, dim=1).T, labels
    )


def of_thresholds(logits, labels):
    above = (labels[:, None] > torch.arange(logits.shape[1])).float()
    return functional.binary_cross_entropy_with_logits(logits, above, reduction="none").sum(1)


def of_normal(outputs, labels):
    mean, log_variance = outputs[:, 0], outputs[:, 1]
    return functional.gaussian_nll_loss(mean, labels.float(), log_variance.exp(), reduction="none")


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(
    ("loss", "width", "expected"),
    [
        (cross_entropy(), CLASSES, True),
        (cross_entropy(weight=WEIGHTS), CLASSES, True),
        (cross_entropy(label_smoothing=0.1), CLASSES, True),
        (cross_entropy(label_smoothing=0.1, weight=WEIGHTS), CLASSES, True),
        (focal, CLASSES, True),
        (per_class(functional.binary_cross_entropy_with_logits), CLASSES, True),
        (per_class(functional.mse_loss), CLASSES, True),
        (lambda logits, labels: cross_entropy()(logits[:, [1, 2, 0]], labels), CLASSES, False),
        (of_prototypes, CLASSES, False),
        (of_prototypes, 8, False),
        (of_thresholds, CLASSES - 1, False),
        (of_thresholds, CLASSES, False),
        (of_normal, 2, False),
    ],
)
def test_gradients_tell_losses_of_classes_from_others(loss, width, expected, scale):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(N, width, generator=generator) + 1e-3).requires_grad_()
    labels = torch.arange(N) % CLASSES
    (gradients,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
    assert tell_classes(logits.detach(), gradients, labels.double()) is expected


def robust(logits, labels):
    return (1 - logits.softmax(1).gather(1, labels[:, None])[:, 0] ** 0.7) / 0.7


def added(logits, labels):
    return cross_entropy()(logits + torch.linspace(2, -2, logits.shape[1]), labels)


def multiplied(logits, labels):
    return cross_entropy(weight=torch.linspace(0.2, 2, logits.shape[1]))(8 * logits, labels)


def of_clusters(logits, labels):
    return cross_entropy()(logits, labels // 2)


@pytest.mark.parametrize("n_classes", [2, 3, 20])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (cross_entropy(), True),
        (lambda logits, labels: cross_entropy(weight=torch.linspace(0.2, 2, logits.shape[1]))(logits, labels), True),
        (cross_entropy(label_smoothing=0.2), True),
        (robust, True),
        (lambda logits, labels: functional.multi_margin_loss(logits, labels, reduction="none"), True),
        (added, False),
        (multiplied, False),
        (of_clusters, False),
    ],
)
def test_what_is_added_to_the_outputs_or_multiplied_is_told_also_of_two_classes(loss, expected, n_classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, n_classes, generator=generator).requires_grad_()
    labels = torch.arange(N) % (2 * n_classes if loss is of_clusters else n_classes)
    (gradients,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
    assert tell_classes(logits.detach(), gradients, labels.double()) is expected
    largest = gradients.abs().amax(1, keepdim=True).clamp(min=1e-30)
    rounded = (gradients / largest * 127).round() * largest / 127  # as "int8" stores them
    found = tell_classes(logits.detach(), 1e-3 * rounded, labels.double(), 1 / 127)
    assert found is not False if expected else not found


class Biased(Toy):
    """What the last layer says is not what the losses are of: a learned prior is added."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.tensor([2.0, 0.0, -2.0]))

    def forward(self, ids):
        return super().forward(ids) + self.prior

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_an_output_to_which_a_prior_is_added_says_no_class(tmp_path):
    fit = fitted(tmp_path, Biased())
    with pytest.warns(UserWarning, match="What Biased says of an example is not known"):
        assert bool(fit.influence(loader(test_texts())).predictions.isnan().all())
    with pytest.raises(ValueError, match="What Biased says cannot be told from its outputs"):
        fit.influence(loader(test_texts()), target="prediction")
    assert fit.label_issues().n_issues is None


def test_labels_without_a_gradient_tell_nothing():
    assert tell_classes(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2).double()) is None
    assert tell_classes(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([-1.0, torch.nan]).double()) is None


class Cosine(Toy):
    """Classes are near to prototypes: the last linear layer projects, and says no class."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def classes(self, ids):
        return 5 * functional.normalize(super().forward(ids), dim=1) @ functional.normalize(self.prototypes, dim=1).T

    def influence_loss(self, batch):
        return functional.cross_entropy(self.classes(batch[0]), batch[1], reduction="none")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Named(Cosine):
    """The same, and its forward names the logits."""

    def forward(self, ids):
        return SimpleNamespace(logits=self.classes(ids))

    def classes(self, ids):
        projected = Toy.forward(self, ids)
        return 5 * functional.normalize(projected, dim=1) @ functional.normalize(self.prototypes, dim=1).T

    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch[0]).logits, batch[1], reduction="none")


def test_a_projection_says_no_class(tmp_path):
    fit = fitted(tmp_path, Cosine())
    with pytest.warns(UserWarning, match="What Cosine says of an example is not known"):
        assert bool(fit.influence(loader(test_texts())).predictions.isnan().all())
    with pytest.raises(ValueError, match="What Cosine says cannot be told from its outputs"):
        fit.influence(loader(test_texts()), target="prediction")
    with pytest.raises(ValueError, match=r"there is no class 3\. Training's labels are of 3"):
        fit.influence(loader(test_texts()), target=3)
    ids, labels = test_texts().tensors
    asked = fit.influence(loader(test_texts()), target=1)
    with pytest.warns(UserWarning, match="is not known"):
        relabelled = fit.influence(loader(TensorDataset(ids, torch.ones_like(labels))))
    torch.testing.assert_close(asked.scores, relabelled.scores)
    assert bool(asked.predictions.isnan().all())
    issues = fit.label_issues()
    assert {each.predicted_label for each in issues.issues} <= {None, ""}
    assert issues.n_issues is None


def test_logits_that_a_module_names_go_before_its_last_layer(tmp_path):
    fit = fitted(tmp_path, Named())
    ids = test_texts().tensors[0]
    with torch.no_grad():
        expected = fit.lightning_module.eval().classes(ids).softmax(1).max(1)
    for target in ("label", "prediction", 2):
        found = fit.influence(loader(test_texts()), target=target)
        assert found.predictions[:, 0].tolist() == expected.indices.tolist()
        torch.testing.assert_close(found.predictions[:, 1].float(), expected.values)
    assert fit.influence(loader(test_texts()), target="prediction").target_names == [
        str(each) for each in expected.indices.tolist()
    ]
    assert {each.predicted_label for each in fit.label_issues().issues} <= {None, ""}


class Normal(Toy):
    """A mean and a variance."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def influence_loss(self, batch):
        return of_normal(self(batch[0]), batch[1])


def test_labels_that_are_no_whole_numbers_are_no_classes(tmp_path):
    train, test = (
        TensorDataset(data.tensors[0], data.tensors[1] + torch.rand(len(data))) for data in (texts(), test_texts())
    )
    fit = fitted(tmp_path, Normal(), loader(train))
    assert bool(fit.influence(loader(test)).predictions.isnan().all())
    with pytest.raises(ValueError, match="the model says 2 values"):
        fit.influence(loader(test), target="prediction")
