"""TrackStar's recipe (Chang et al. 2024, arXiv 2410.17413), in a few lines of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.evidence.examples import Examples
from benchmarks.evidence.peers.network import Positional, as_tensors, example_gradients


def track_star(
    network: nn.Module,
    names: Sequence[str],
    second_moments: Mapping[str, Tensor],
    test: Examples,
    train: Examples,
    *,
    side: int = 16,
    damping: float = 0.1,
    batch_size: int = 32,
) -> Tensor:
    """Cosines of R^-1/2 P (g / sqrt(V)) at the end of training.

    Args:
        network: with its weights.
        names: of the weights that gradients are taken of.
        second_moments: Adam's V of each.
        test: what is explained.
        train: the training examples, whose projected gradients have the covariance R.
        side: each weight's gradient, a matrix, is projected to so many rows and columns by random Gaussian matrices.
        damping: share of R's mean eigenvalue that is added to its diagonal.
        batch_size: of every pass.

    Returns:
        (n_test, n_train) float32.
    """
    wrapped = Positional(network)
    scales = {f"network.{name}": second_moments[name].sqrt() + 1e-8 for name in names}
    generator = torch.Generator().manual_seed(0)
    projections = {
        name: tuple(torch.randn(size, side, generator=generator) / side**0.5 for size in scale.flatten(1).shape)
        for name, scale in scales.items()
    }
    gradients = example_gradients(wrapped, list(scales))

    def projected(examples: Examples) -> Tensor:
        rows = []
        for batch in DataLoader(as_tensors(examples), batch_size=batch_size):
            of_names = gradients(batch)
            parts = []
            for name, (left, right) in projections.items():
                scaled = (of_names[name] / scales[name]).flatten(2)
                parts.append((left.T @ scaled @ right).flatten(1))
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    return whitened_cosine(projected(test), projected(train), damping)


def whitened_cosine(test: Tensor, train: Tensor, damping: float) -> Tensor:
    """The cosine of R^-1/2 x, with R the second moment of the training side.

    Args:
        test: (n_test, d).
        train: (n_train, d).
        damping: share of R's mean eigenvalue that is added to its diagonal.

    Returns:
        (n_test, n_train) float32.

    Example:
        >>> points = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> whitened_cosine(torch.tensor([[3.0, 1.0]]), points, damping=0.0)
        tensor([[0.7071, 0.7071]])
    """
    covariance = train.T.double() @ train.double() / len(train)
    values, vectors = torch.linalg.eigh(covariance)
    roots = vectors * (values.clamp(min=0) + damping * values.mean()).rsqrt()
    test, train = (functional.normalize(each.double() @ roots) for each in (test, train))
    return (test @ train.T).float()
