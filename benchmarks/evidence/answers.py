"""What a fitted network says of examples: inputs of its last layer, probabilities, losses, gradients at its words."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.evidence.examples import Examples, Rows, trimmed
from benchmarks.evidence.networks import Network


@dataclass(frozen=True)
class Answers:
    """What a network says of n examples.

    Attributes:
        features: inputs of the last layer, (n, d).
        probabilities: of the classes, (n, C).
        labels: the true classes, (n,).
    """

    features: Tensor
    probabilities: Tensor
    labels: Tensor


def network_with(module: Network, weights: dict[str, Tensor]) -> Network:
    """A copy of a network with other weights, in eval mode."""
    network = copy.deepcopy(module)
    network.load_state_dict(weights)
    return network.eval()


def answers(network: Network, examples: Examples) -> Answers:
    """One pass over examples."""
    features: list[Tensor] = []
    head = network.get_submodule("head")
    handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        logits = torch.cat([network(batch) for batch in batches(examples)])
    handle.remove()
    return Answers(torch.cat(features), logits.softmax(1), examples.labels)


def losses(network: Network, of: Iterable[dict[str, Tensor]]) -> Tensor:
    """The loss of each example of some batches, (n,)."""
    return torch.cat([network.influence_loss(batch) for batch in of])


def word_gradients(network: Network, layer: str, examples: Examples) -> Tensor:
    """The gradient of each example's loss at the output of a word embedding layer, (n, T, H) float32."""
    found: list[Tensor] = []

    def remember(layer: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(found.append)  # type: ignore[no-untyped-call]

    handle = network.get_submodule(layer).register_forward_hook(remember)
    rows = []
    for batch in batches(examples):
        network.influence_loss(batch).sum().backward()  # type: ignore[no-untyped-call]
        gradients = found.pop()
        rows.append(functional.pad(gradients, (0, 0, 0, examples.ids.shape[1] - gradients.shape[1])))
    handle.remove()
    network.zero_grad()
    return torch.cat(rows)


def batches(examples: Examples, size: int = 128) -> Iterator[dict[str, Tensor]]:
    """The examples in order, in batches."""
    yield from DataLoader(Rows(examples, range(len(examples))), batch_size=size, collate_fn=trimmed)
