"""UnTrac-Inv: unlearn one test example, and see which training examples are forgotten with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def untrac_inv(
    module: nn.Module,
    test_losses: Callable[[nn.Module, int], Tensor],
    train_losses: Callable[[nn.Module], Tensor],
    n_test: int,
    *,
    steps: int = 5,
    learning_rate: float = 5e-5,
) -> Tensor:
    """UnTrac-Inv (Misonuma and Titov 2024, arXiv 2401.15241): each training example's change of loss.

    From the weights of the end of training, a few steps of Adam raise the loss of one test example; dropout is off.

    Args:
        module: with its weights; it is not changed.
        test_losses: the loss of the test example of that number.
        train_losses: (n_train,) losses of the training examples.
        n_test: number of test examples.
        steps: of Adam.
        learning_rate: of Adam.

    Returns:
        (n_test, n_train) float32: loss after unlearning - loss before.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad(): _ = layer.weight.fill_(0.0)
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> def losses(layer): return (layer(x) - 1).square()[:, 0]
        >>> untrac_inv(layer, lambda layer, number: losses(layer)[number], losses, 2, steps=1, learning_rate=0.1)
        tensor([[ 0.2100, -0.1900],
                [-0.1900,  0.2100]])
    """
    learner = copy.deepcopy(module).eval()
    weights = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        before = train_losses(learner)
    scores = []
    for number in range(n_test):
        learner.load_state_dict(weights)
        optimizer = torch.optim.Adam(learner.parameters(), lr=learning_rate, maximize=True)
        for _ in range(steps):
            optimizer.zero_grad()
            test_losses(learner, number).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            scores.append(train_losses(learner) - before)
    return torch.stack(scores)
