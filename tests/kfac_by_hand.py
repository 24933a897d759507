"""K-FAC by its definition: dense per-example gradients, dense second moments, matrix roots; double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class OneExample:
    """An example at a layer: its inputs (T, in) and output gradients (T, out) by position, its gradient (out, in)."""

    inputs: Tensor
    deltas: Tensor
    gradient: Tensor


def windows(layer: nn.Module, value: Tensor) -> Tensor:
    """(T, in) what a linear layer or a convolution of one example multiplies with its weight."""
    if isinstance(layer, nn.Conv1d):
        value = functional.unfold(value[:, :, None], (1, *layer.kernel_size), padding=(0, *layer.padding))
        return value[0].T
    if isinstance(layer, nn.Conv2d):
        return functional.unfold(value, layer.kernel_size, padding=layer.padding)[0].T
    return value.reshape(-1, value.shape[-1])


def example_at(module: Any, layer: nn.Module, batch: Any) -> OneExample:
    """The example of a batch of one, in double precision."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    loss = module.loss(batch)
    hook.remove()
    found = torch.autograd.grad(loss, [layer.weight, *(output for _, output in calls)])
    channels_first = not isinstance(layer, nn.Linear)
    deltas = [each[0].flatten(1).T if channels_first else each.reshape(-1, each.shape[-1]) for each in found[1:]]
    inputs = torch.cat([windows(layer, value) for value, _ in calls]).double().detach()
    return OneExample(inputs, torch.cat(deltas).double(), found[0].flatten(1).double())


def inverse_root(rows: Tensor, damping: float, rank: int | None) -> Tensor:
    """(M + damping tr(M) / n I)^(-1/2) of M = mean x x', on the leading eigenvectors alone where there is a rank."""
    moments = rows.T @ rows / len(rows)
    damped = moments + damping * moments.trace() / len(moments) * torch.eye(len(moments), dtype=torch.float64)
    left, values, _ = torch.linalg.svd(damped)
    return (left[:, :rank] * values[:rank] ** -0.5) @ left[:, :rank].T


def kfac_scores(
    rates: list[float],
    test: list[list[OneExample]],
    train: list[list[OneExample]],
    sample: list[int],
    *,
    damping: float = 0.1,
    rank: tuple[int, int] | None = None,
    normalize: str | None = None,
) -> Tensor:
    """(n_test, n_train) at checkpoints with these rates; second moments are of the training examples in the sample."""
    total = torch.zeros(len(test[0]), len(train[0]), dtype=torch.float64)
    for rate, queries, examples in zip(rates, test, train, strict=True):
        chosen = [examples[index] for index in sample]
        reached = torch.cat([each.deltas for each in chosen]).any(1)
        ranks = rank or (None, None)
        left = inverse_root(torch.cat([each.deltas for each in chosen])[reached], damping, ranks[1])
        right = inverse_root(torch.cat([each.inputs for each in chosen])[reached], damping, ranks[0])
        of_test, of_train = (
            torch.stack([(left @ each.gradient @ right).flatten() for each in side]) for side in (queries, examples)
        )
        if normalize is not None:
            of_train = functional.normalize(of_train)
        if normalize == "cosine":
            of_test = functional.normalize(of_test)
        total += rate * of_test @ of_train.T
    return total
