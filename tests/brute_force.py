"""The definition of TracIn, word for word: one example at a time, dense gradients of the weights, double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def untie(module: nn.Module, embedding: nn.Module) -> None:
    """Give linear layers that use the embedding's weight their own, so that its gradient is of the embedding alone."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.weight is embedding.weight:
            part.weight = nn.Parameter(part.weight.detach().clone())


def with_bias(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def weight_of(layer: nn.Module, tensor: Tensor) -> Tensor:
    """(out, in) of a linear layer's weight, or of what has its shape; a table's as it is."""
    return tensor.T if type(layer).__name__ == "Conv1D" else tensor.flatten(1)


def dense_gradients(
    module: nn.Module, layer: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> Tensor:
    """(examples, rows, columns): the gradient of the layer's weight, and of its bias as one more column."""
    parameters = [each for each in (layer.weight, getattr(layer, "bias", None)) if each is not None]
    module.eval()
    for parameter in parameters:
        parameter.requires_grad_()
    gradients = [torch.autograd.grad(loss(batch), parameters) for batch in batches]
    return torch.stack([with_bias(weight_of(layer, weight), *bias) for weight, *bias in gradients]).double()


def second_moments_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, tuple[Tensor, float]]:
    """Bias-corrected second moments by the name of the parameter, with epsilon."""
    state = optimizer.state_dict()["state"]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    moments, position = {}, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = state[position]
            value = own["exp_avg_sq"] / (1 - group["betas"][1] ** own["step"].item())
            moments[names[id(parameter)]] = (value, group["eps"])
            position += 1
    return moments


class AdamMoments(pl.Callback):
    """Bias-corrected second moments at the end of each epoch, by the name of the parameter, with epsilon."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, tuple[Tensor, float]]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.epochs.append(second_moments_of(optimizer, pl_module))

    def of(self, name: str, layer: nn.Module) -> list[tuple[Tensor, float]]:
        """At each epoch's end, those of a layer's weight, in the form of its gradients, and epsilon."""
        found = []
        for epoch in self.epochs:
            weight, eps = epoch[f"{name}.weight"]
            found.append((with_bias(weight_of(layer, weight), epoch.get(f"{name}.bias", (None,))[0]), eps))
        return found


@dataclass(frozen=True)
class BruteForce:
    """Gradients (examples, rows, columns) of one layer at every checkpoint, and its mean learning rates."""

    rates: list[float]
    test: list[Tensor]
    train: list[Tensor]

    def scores(
        self,
        *,
        exclude_tokens: Iterable[int] = (),
        top_words: int | None = None,
        normalize: str | None = None,
        second_moments: list[tuple[Tensor, float]] | None = None,
    ) -> Tensor:
        """(n_test, n_train); second moments are bias-corrected, (rows, columns), each with Adam's epsilon."""
        total = torch.zeros(len(self.test[0]), len(self.train[0]), dtype=torch.float64)
        for number, (rate, *sides) in enumerate(zip(self.rates, self.test, self.train, strict=True)):
            weights = product_weights(sides[0], second_moments and second_moments[number])
            test, train = (chosen_rows(side, weights, exclude_tokens, top_words) for side in sides)
            products = torch.einsum("iab,jab,ab->ij", test, train, weights)
            test_norms, train_norms = (torch.einsum("iab,iab,ab->i", g, g, weights).sqrt() for g in (test, train))
            if normalize in ("train", "cosine"):
                products = products * _inverse(train_norms)
            if normalize == "cosine":
                products = products * _inverse(test_norms)[:, None]
            total += rate * products
        return total

    def terms(self, test_index: int, train_index: int) -> Tensor:
        """(rows,) each row's part in the score of a pair."""
        return sum(
            rate * (test[test_index] * train[train_index]).sum(1)
            for rate, test, train in zip(self.rates, self.test, self.train, strict=True)
        )


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms; what has no gradient has no score."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def product_weights(gradients: Tensor, moments: tuple[Tensor, float] | None) -> Tensor:
    """(rows, columns) what each product of gradients counts, by second moments."""
    if moments is None:
        return torch.ones_like(gradients[0])
    values, eps = moments
    return torch.where(values > 0, 1 / (values.double().sqrt() + eps), 0.0)


def chosen_rows(gradients: Tensor, weights: Tensor, exclude_tokens: Iterable[int], top_words: int | None) -> Tensor:
    """The gradients with rows set to zero: those excluded, and all but the ``top_words`` longest of each example."""
    gradients = gradients.clone()
    gradients[:, list(exclude_tokens)] = 0
    if top_words is not None:
        lengths = (gradients**2 * weights).sum(2)
        strongest = lengths.topk(top_words, dim=1).indices
        gradients *= torch.zeros_like(lengths).scatter(1, strongest, 1.0)[..., None]
    return gradients
