"""dattri 0.3: TRAK (Park et al. 2023, arXiv 2303.14186) and its TracIn with random projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.evidence.examples import Examples
from benchmarks.evidence.peers.network import Positional, as_tensors, checkpoint_weights


def trak(
    network: nn.Module,
    weights: Sequence[dict[str, Tensor]],
    test: Examples,
    train: Examples,
    names: Sequence[str] | None = None,
    *,
    dimensions: int = 512,
) -> Tensor:
    """TRAK's scores: margins, projected gradients, averaged over checkpoints as over an ensemble.

    Args:
        network: whose weights they are.
        weights: of the checkpoints.
        test: what is explained.
        train: the training examples.
        names: of the parameters that gradients are taken of; None for all.
        dimensions: of the projection.

    Returns:
        (n_test, n_train) float32.
    """
    from dattri.algorithm.trak import TRAKAttributor

    wrapped = Positional(network)

    def log_probability(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        return -_loss(wrapped, parameters, row)

    def margin(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        said = log_probability(parameters, row)
        return said - torch.log1p(-said.exp().clamp(max=1 - 1e-7))

    def probability(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        return log_probability(parameters, row).exp()

    attributor = TRAKAttributor(
        _attribution_task(margin, wrapped, weights),
        probability,
        projector_kwargs={"proj_dim": dimensions},
        layer_name=_wrapped_names(names),
    )
    batch_size = _batch_size(wrapped)
    scores: Tensor = attributor.attribute(_loader(test, batch_size), _loader(train, batch_size))
    return scores.T.detach().float()


def projected_tracin(
    network: nn.Module,
    weights: Sequence[dict[str, Tensor]],
    rates: Sequence[float],
    test: Examples,
    train: Examples,
    names: Sequence[str],
    *,
    dimensions: int = 512,
) -> Tensor:
    """TracIn over several layers together, by random projections; as :func:`trak`, with learning rates."""
    from dattri.algorithm.tracin import TracInAttributor

    wrapped = Positional(network)

    def loss(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        return _loss(wrapped, parameters, row)

    attributor = TracInAttributor(
        _attribution_task(loss, wrapped, weights),
        torch.tensor(rates),
        normalized_grad=False,
        projector_kwargs={"proj_dim": dimensions},
        layer_name=_wrapped_names(names),
    )
    batch_size = _batch_size(wrapped)
    scores: Tensor = attributor.attribute(_loader(train, batch_size), _loader(test, batch_size))
    return scores.T.detach().float()


def _loss(network: Positional, parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
    *inputs, label = (each[None] for each in row)
    return functional.cross_entropy(functional_call(network, parameters, tuple(inputs)), label)


def _attribution_task(function: Any, wrapped: Positional, weights: Sequence[dict[str, Tensor]]) -> Any:
    from dattri.task import AttributionTask

    return AttributionTask(loss_func=function, model=wrapped, checkpoints=checkpoint_weights(wrapped, weights))


def _wrapped_names(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else [f"network.{name}" for name in names]


def _batch_size(network: Positional) -> int:
    """As many examples as have a gigabyte of gradients: dattri draws the projection anew for each batch.

    It takes the gradients of all parameters, and leaves out those that are not asked for afterwards.
    """
    return max(8, 2**28 // sum(parameter.numel() for parameter in network.parameters()))


def _loader(examples: Examples, batch_size: int) -> DataLoader[Any]:
    return DataLoader(as_tensors(examples), batch_size=batch_size)
