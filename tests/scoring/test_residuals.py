"""Residuals from stored gradients against what the model says of each training example, for each kind of loss."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from toy import N_TRAIN, Toy, fitted, loader, quiet, site_of, texts

from lightning_tracin import Trace, TracInCallback, TracInMixin, TracInWE
from lightning_tracin.scoring.residuals import mean_residual_at, residuals_at
from lightning_tracin.storage import shards
from lightning_tracin.storage.files import read_json, write_json


class Other(TracInMixin, pl.LightningModule):
    """Embeds, averages, and says as many numbers as it is told; what its loss is, a kind says."""

    outputs = 1

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, self.outputs)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))

    def influence_loss(self, batch):
        return self.losses(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneLogit(Other):
    def targets(self, labels):
        return (labels > 0).float()

    def losses(self, said, wanted):
        return functional.binary_cross_entropy_with_logits(said[:, 0], wanted, reduction="none")

    def residual(self, said, wanted):
        p = said[:, 0].sigmoid()
        return 1 - torch.where(wanted > 0, p, 1 - p)


class Regression(Other):
    def targets(self, labels):
        return labels - 0.7

    def losses(self, said, wanted):
        return (said[:, 0] - wanted) ** 2

    def residual(self, said, wanted):
        return 2 * (said[:, 0] - wanted).abs()


class SeveralLabels(Other):
    outputs = 4

    def targets(self, labels):
        return torch.stack([labels == 0, labels == 1, labels != 2, labels == labels], 1).float()

    def losses(self, said, wanted):
        return functional.binary_cross_entropy_with_logits(said, wanted, reduction="none").mean(1)

    def residual(self, said, wanted):
        return (said.sigmoid() - wanted).abs().amax(1) / 4


class Smoothed(Other):
    """What the label lacks to the target, not to 1."""

    outputs = 3

    def targets(self, labels):
        return labels

    def losses(self, said, wanted):
        return functional.cross_entropy(said, wanted, reduction="none", label_smoothing=0.3)

    def residual(self, said, wanted):
        target = 0.7 * functional.one_hot(wanted, 3) + 0.1
        return (said.softmax(1) - target).abs().amax(1)


class Weighted(Other):
    """As often as its class weighs."""

    outputs = 3

    def targets(self, labels):
        return labels

    def losses(self, said, wanted):
        return functional.cross_entropy(said, wanted, reduction="none", weight=torch.tensor([1.0, 2.0, 5.0]))

    def residual(self, said, wanted):
        p = said.softmax(1).gather(1, wanted[:, None])[:, 0]
        return torch.tensor([1.0, 2.0, 5.0])[wanted] * (1 - p)


class Tags(Other):
    """The mean over the tokens that have a tag; the first of each text has none. As many tags as make factors small."""

    outputs = 200

    def forward(self, ids):
        return self.head(self.embedding(ids))

    def targets(self, labels):
        tags = (labels[:, None] + torch.arange(7) * 31) % 200
        return tags.masked_fill(torch.arange(7) == 0, -100)

    def losses(self, said, wanted):
        each = functional.cross_entropy(said.transpose(1, 2), wanted, reduction="none", ignore_index=-100)
        return each.sum(1) / (wanted != -100).sum(1)

    def residual(self, said, wanted):
        p = said[:, 1:].softmax(2).gather(2, wanted[:, 1:, None])[..., 0]
        return (1 - p).mean(1)


@pytest.mark.parametrize("kind", [OneLogit, Regression, SeveralLabels, Smoothed, Weighted, Tags])
def test_a_residual_is_the_largest_entry_of_the_gradient_at_the_output(tmp_path, kind):
    pl.seed_everything(0, verbose=False)
    ids, labels = texts().tensors
    module = kind()
    data = TensorDataset(ids, module.targets(labels))
    callback = TracInCallback(tmp_path, dtype="float32", on_error="raise")
    quiet(callbacks=[callback]).fit(module, DataLoader(data, 4, shuffle=True))
    for checkpoint in Trace(tmp_path).checkpoints:
        module.load_state_dict(checkpoint.weights())
        with torch.no_grad():
            expected = module.residual(module(ids), data.tensors[1])
        torch.testing.assert_close(residuals_at(checkpoint), expected, rtol=1e-4, atol=1e-6)


def lacking(checkpoint) -> torch.Tensor:
    """What the label of each training example of the toy lacks to probability 1."""
    module = Toy().eval()
    module.load_state_dict(checkpoint.weights())
    ids, labels = texts().tensors
    with torch.no_grad():
        return 1 - module.double()(ids).softmax(1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 1e-2)])
def test_of_one_label_it_is_what_that_lacks_to_probability_1(tmp_path, monkeypatch, dtype, tolerance):
    monkeypatch.setattr(shards, "MOST_SHARD_EXAMPLES", 7)
    fitted(tmp_path, dtype=dtype)
    for checkpoint in Trace(tmp_path).checkpoints:
        expected, found = lacking(checkpoint), residuals_at(checkpoint)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        assert mean_residual_at(checkpoint) == pytest.approx(float(expected.mean()), rel=tolerance)


def test_what_was_not_drawn_does_not_count(tmp_path):
    drawn = [2, 3, 5, 7, 11, 13, 17]
    fitted(tmp_path, data=loader(sampler=SubsetRandomSampler(drawn)))
    checkpoint = Trace(tmp_path).checkpoints[0]
    found, expected = residuals_at(checkpoint), lacking(checkpoint)[drawn]
    torch.testing.assert_close(found[drawn].double(), expected, rtol=1e-5, atol=1e-6)
    assert found.count_nonzero() == len(drawn) < N_TRAIN
    assert mean_residual_at(checkpoint) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_what_is_not_finite_does_not_count(tmp_path):
    """Their gradients count zero, as a loss scaler leaves them in training: that is no residual of zero."""
    fitted(tmp_path)
    checkpoint = Trace(tmp_path).checkpoints[0]
    before = mean_residual_at(checkpoint)
    index = checkpoint.path / site_of(checkpoint, "tracin-last").key / "index.json"
    write_json(index, {**read_json(index), "not_finite": [4, 6]})
    assert mean_residual_at(checkpoint) == pytest.approx(before * N_TRAIN / (N_TRAIN - 2))


class Tagger(Toy):
    """Its head is applied at many positions, and says little."""

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))

    def influence_loss(self, batch):
        ids, labels = batch
        wanted = (ids + labels[:, None]) % 3
        return functional.cross_entropy(self(ids).movedim(-1, 1), wanted, reduction="none").mean(1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Toy, {"methods": ("tracin-we",)}, r"need the gradients at the last linear layer, but the fit recorded \('tr"),
        (Toy, {"methods": ("tracin-we", "tracin-last"), "projection": (2, 2)}, "'head' as factors, but .* one matrix"),
        (Tagger, {}, "'head' as factors, but the trace keeps them as one matrix"),
    ],
    ids=["not recorded", "projected", "a matrix"],
)
def test_a_trace_that_does_not_tell_residuals_says_so(tmp_path, kind, options, message):
    fit = fitted(tmp_path, kind(), **options)
    with pytest.raises(ValueError, match=message):
        fit.influence(loader(), method=TracInWE(weights="residual"))


def test_a_log_that_needs_residuals_is_refused_before_training(tmp_path):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            pass

    options = {"methods": ("tracin-we",), "log_examples": 1, "log_method": TracInWE(weights="residual")}
    fit = quiet(callbacks=[TracInCallback(tmp_path / "trace", **options)])
    with pytest.raises(ValueError, match="need the gradients at the last linear layer"):
        fit.fit(Validated(), loader(), loader())
    assert not (tmp_path / "trace").exists()
