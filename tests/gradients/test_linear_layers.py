"""Factors of every kind of linear layer, and the blocks made of them, against dense gradients of the weights."""

from __future__ import annotations

import pytest
import torch
from brute_force import relative_error, with_bias
from stored_files import encoded_bytes
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_tracin.gradients.capture import capture
from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.layers import SiteLayers
from lightning_tracin.gradients.linear_layers import as_matrix
from lightning_tracin.gradients.matrix_gradients import MatrixGradients
from lightning_tracin.gradients.sites import Site
from lightning_tracin.scoring.methods import TracInLayer
from lightning_tracin.storage.encoding import StorageOptions, size_of_captured
from lightning_tracin.storage.second_moments import SecondMoments
from lightning_tracin.storage.sizes import LayerSize

B, T, IN, OUT = 3, 7, 4, 6
SEQUENCE, IMAGE, TOKENS = (B, IN, T), (B, IN, 5, 6), (B, T, IN)
LAYERS = {
    "linear": (nn.Linear(IN, OUT), TOKENS),
    "linear, no bias": (nn.Linear(IN, OUT, bias=False), TOKENS),
    "linear, one position": (nn.Linear(IN, OUT), (B, IN)),
    "linear, three dimensions of positions": (nn.Linear(IN, OUT), (B, 2, 3, IN)),
    "Conv1D of transformers": (Conv1D(OUT, IN), TOKENS),
    "sequence": (nn.Conv1d(IN, OUT, 3), SEQUENCE),
    "sequence, padded": (nn.Conv1d(IN, OUT, 3, padding=1), SEQUENCE),
    "sequence, the same length": (nn.Conv1d(IN, OUT, 5, padding="same"), SEQUENCE),
    "sequence, valid": (nn.Conv1d(IN, OUT, 2, padding="valid", bias=False), SEQUENCE),
    "sequence, stride and dilation": (nn.Conv1d(IN, OUT, 3, stride=2, dilation=2, padding=2), SEQUENCE),
    "sequence, circular": (nn.Conv1d(IN, OUT, 3, padding=2, padding_mode="circular"), SEQUENCE),
    "sequence, reflected": (nn.Conv1d(IN, OUT, 3, padding=2, padding_mode="reflect"), SEQUENCE),
    "sequence, groups": (nn.Conv1d(IN, OUT, 3, groups=2, padding=1), SEQUENCE),
    "sequence, by channel": (nn.Conv1d(IN, IN, 3, groups=IN, bias=False), SEQUENCE),
    "image": (nn.Conv2d(IN, OUT, 3), IMAGE),
    "image, all at once": (nn.Conv2d(IN, OUT, (2, 3), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), IMAGE),
    "image, replicated": (nn.Conv2d(IN, OUT, 3, padding=(1, 2), padding_mode="replicate"), IMAGE),
    "image, the same size": (nn.Conv2d(IN, OUT, (3, 5), padding="same", groups=2), IMAGE),
}


def captured(layer, values):
    """Gradients of one loss for each example, by factors and densely."""
    site = Site("linear-0", "layer", "layer", "factors")

    def losses(batch):
        return (layer(batch) ** 2).tanh().flatten(1).sum(1)

    found = capture(losses, values, [SiteLayers(site, (layer,))]).gradients["linear-0"]
    parameters = [each for each in (layer.weight, layer.bias) if each is not None]
    dense = []
    for value in values:
        weight, *bias = torch.autograd.grad(losses(value[None]).sum(), parameters)
        dense.append(with_bias(as_matrix(layer, weight), bias[0] if bias else None))
    return found, torch.stack(dense).double()


def whole(factors: FactorGradients) -> torch.Tensor:
    matrices = torch.zeros(factors.n_examples, factors.deltas.shape[1], factors.inputs.shape[1], dtype=torch.float64)
    for examples, some in factors.matrices():
        matrices[examples] = some
    return matrices


@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_those_of_the_dense_gradient(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    factors, dense = captured(layer, torch.randn(shape))
    assert dense[0].numel() == sum(each.numel() for each in layer.parameters())
    assert relative_error(whole(factors), dense) < 1e-6
    norms = dense.flatten(1).norm(dim=1)
    torch.testing.assert_close(factors.example_norms().double(), norms, rtol=1e-5, atol=0)
    matrices = MatrixGradients.from_factors(factors, None)
    assert relative_error(matrices.directions.view(dense.shape) * matrices.norms[:, None, None], dense) < 1e-6


def ragged(lengths, inputs=5, outputs=4, seed=0):
    """Factors of examples with so many positions, and their dense gradients."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    h = torch.randn(len(owners), inputs, generator=generator)
    delta = torch.randn(len(owners), outputs, generator=generator)
    dense = torch.zeros(len(lengths), outputs, inputs, dtype=torch.float64)
    dense.index_add_(0, owners, torch.einsum("po,pi->poi", delta, h).double())
    return FactorGradients.from_positions(len(lengths), owners, h, delta), dense


@pytest.mark.parametrize("entries", [1, 200, 2**24])  # one example at a time, a few, all
@pytest.mark.parametrize("weighted", [False, True])
def test_examples_of_any_number_of_positions(monkeypatch, entries, weighted):
    monkeypatch.setattr("lightning_tracin.gradients.memory.NUMBERS_AT_ONCE", entries)
    test, test_dense = ragged([3, 0, 1, 9])
    train, train_dense = ragged([0, 1, 12, 2, 2, 7, 1], seed=1)
    moments = SecondMoments(torch.rand(4, 5), None, 1e-8) if weighted else None
    weights = moments.weights().double() if weighted else torch.ones(4, 5, dtype=torch.float64)
    expected = torch.einsum("aoi,boi,oi->ab", test_dense, train_dense, weights)
    method = TracInLayer("layer", precondition="adam" if weighted else None)
    assert relative_error(method.dot(test, train, moments), expected) < 1e-5
    norms = (weights * train_dense**2).sum((1, 2)).sqrt()
    torch.testing.assert_close(method.norms(train, moments).double(), norms, rtol=1e-5, atol=0)
    as_matrices = [MatrixGradients.from_factors(block, None) for block in (test, train)]
    assert relative_error(method.dot(*as_matrices, moments), expected) < 1e-5
    torch.testing.assert_close(method.norms(as_matrices[1], moments).double(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-15, 1e-25])
def test_tiny_gradients_keep_their_norms(scale):
    _, dense = ragged([4, 1, 6])
    owners = torch.arange(3).repeat_interleave(torch.tensor([4, 1, 6]))
    generator = torch.Generator().manual_seed(0)
    h, delta = (torch.randn(11, size, generator=generator) for size in (5, 4))
    factors = FactorGradients.from_positions(3, owners, h, delta * scale)
    norms = dense.flatten(1).norm(dim=1) * scale
    torch.testing.assert_close(factors.example_norms().double(), norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(MatrixGradients.from_factors(factors, None).norms.double(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_takes_less_space_is_stored(dtype):
    site = Site("linear-0", "layer", "layer", "factors")
    few, many = ragged([1, 1, 1], 40, 30)[0], ragged([50, 60, 70], 40, 30)[0]
    assert StorageOptions(dtype).applied(site, size_of_captured(few)).shape == "factors"
    assert StorageOptions(dtype).applied(site, size_of_captured(many)).shape == "matrix"
    assert StorageOptions(dtype, projection=(8, 9)).applied(site, size_of_captured(few)).shape == "factors"
    chosen = StorageOptions(dtype, projection=(8, 9)).applied(site, size_of_captured(many))
    assert (chosen.shape, chosen.projection) == ("matrix", (8, 9))
    stored = chosen.stored(many)
    for options in (StorageOptions(dtype), StorageOptions(dtype, projection=(8, 9))):
        for block in (few, many, ragged([0, 2, 0], 40, 30)[0]):
            size = size_of_captured(block)
            written = encoded_bytes(options.applied(site, size).stored(block), dtype)
            assert options.nbytes(size) * block.n_examples == pytest.approx(written)
    assert stored.directions.shape == (3, 72)
    torch.testing.assert_close(stored.norms, many.example_norms())


def test_no_matrix_is_formed_to_find_out_what_it_would_take():
    wide = LayerSize([2**19], (2**19, 2**19))
    assert wide.shape("float16") == "matrix"
    assert wide.nbytes("float16") > 2**39  # half a terabyte


def test_projections_keep_angles_as_well_as_their_size_lets_them():
    """The error of a cosine falls with the root of the number of products that are averaged."""
    blocks = [ragged([20] * 200, 64, 48, seed=seed)[0] for seed in (3, 4)]
    exact = TracInLayer("layer", normalize="cosine")
    plain = [exact.prepare(MatrixGradients.from_factors(block, None), None, "test") for block in blocks]
    errors = []
    for sizes in [(4, 4), (8, 16), (32, 64)]:
        small = [exact.prepare(MatrixGradients.from_factors(block, sizes), None, "test") for block in blocks]
        errors.append(float((exact.dot(*small, None) - exact.dot(*plain, None)).square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] == pytest.approx(1 / 4, rel=0.5)  # 1 / sqrt(4 * 4)


def test_a_side_that_is_narrower_than_its_projection_is_kept_whole():
    factors, dense = ragged([5, 3], 40, 3)
    stored = MatrixGradients.from_factors(factors, (16, 64))
    assert relative_error(stored.directions.view(dense.shape) * stored.norms[:, None, None], dense) < 1e-6
