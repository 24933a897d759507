"""What the last layer alone says: cosine of representations, representer points, influence functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def representation_cosine(test: Tensor, train: Tensor) -> Tensor:
    """The cosine of the inputs of the last layer.

    Args:
        test: (n_test, d).
        train: (n_train, d).

    Returns:
        (n_test, n_train) float32.

    Example:
        >>> representation_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [3.0, 4.0]]))
        tensor([[1.0000, 0.6000]])
    """
    return functional.normalize(test) @ functional.normalize(train).T


def fitted_last_layer(inputs: Tensor, labels: Tensor, n_classes: int, l2: float) -> Tensor:
    """The weight at which mean cross-entropy + l2 |W|² is stationary, with the inputs as they are.

    Args:
        inputs: (n, d) with a column of ones for the bias, which is penalised like the rest.
        labels: (n,) classes.
        n_classes: how many there are.
        l2: weight of the penalty.

    Returns:
        (n_classes, d) float64.

    Raises:
        RuntimeError: if the gradient has not come down to 1e-6.

    Example:
        >>> fitted_last_layer(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 2, l2=0.1)
        tensor([[ 0.8168],
                [-0.8168]], dtype=torch.float64)
    """
    inputs = inputs.double()
    weight = torch.zeros(n_classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=2000,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
    )

    def penalised_loss() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight.T, labels) + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(penalised_loss)  # type: ignore[no-untyped-call]
    penalised_loss()
    assert weight.grad is not None
    if weight.grad.abs().max() > 1e-6:
        raise RuntimeError(f"The last layer was not fitted: a gradient of {weight.grad.abs().max():.1e} is left.")
    return weight.detach()


def representer_points(
    test: Tensor, train: Tensor, test_labels: Tensor, train_labels: Tensor, n_classes: int, l2: float = 3e-3
) -> Tensor:
    """Representer points (Yeh et al. 2018, arXiv 1811.09720, theorem 3.1).

    The theorem is of a last layer at which the penalised loss is stationary. A network as it was trained is at no such
    point, so the last layer is fitted again, on the representations as they are, as the paper does it. Then
    logit_j(z') = Σ_i α_ij (h_i · h' + 1) with α_i = -1 / (2 l2 n) dl_i / dlogits, and the score is the term of i, j the
    label of z'.

    Args:
        test: (n_test, d) inputs of the last layer.
        train: (n_train, d).
        test_labels: (n_test,) classes.
        train_labels: (n_train,) classes.
        n_classes: how many there are.
        l2: weight of the penalty; the paper's experiments have 3e-3.

    Returns:
        (n_test, n_train) float32; they add up to the refitted layer's logits of the labels.

    Example:
        >>> points = torch.tensor([[1.0], [-1.0]])
        >>> representer_points(points[:1], points, torch.tensor([0]), torch.tensor([0, 1]), 2, l2=0.1)
        tensor([[0.8168, -0.0000]])
    """
    train, test = _with_ones(train), _with_ones(test)
    weight = fitted_last_layer(train, train_labels, n_classes, l2)
    residuals = (train @ weight.T).softmax(1) - functional.one_hot(train_labels, n_classes)
    alphas = -residuals / (2 * l2 * len(train))
    return (alphas.T[test_labels] * (test @ train.T)).float()


def last_layer_influence(
    test: Tensor,
    train: Tensor,
    test_probabilities: Tensor,
    train_probabilities: Tensor,
    labels: tuple[Tensor, Tensor],
    damping: float = 0.1,
) -> Tensor:
    """Influence functions at the last layer (Inf-Last): g' (H + damping tr(H) / d I)^-1 g.

    For cross-entropy and a linear layer the Gauss-Newton matrix, mean (diag(p) - p p') ⊗ h h', is the Hessian.

    Args:
        test: (n_test, d) inputs of the last layer; a one is appended for the bias.
        train: (n_train, d).
        test_probabilities: (n_test, C) what the model says.
        train_probabilities: (n_train, C).
        labels: of test and of training examples, (n_test,) and (n_train,).
        damping: share of the Hessian's mean eigenvalue that is added to its diagonal.

    Returns:
        (n_test, n_train) float32.

    Example:
        >>> h, p, y = torch.tensor([[1.0], [0.0]]), torch.full((2, 2), 0.5), torch.tensor([0, 1])
        >>> last_layer_influence(h[:1], h, p[:1], p, (y[:1], y), damping=1.0)
        tensor([[ 1.3115, -0.3934]])
    """
    inputs = {"test": _with_ones(test), "train": _with_ones(train)}
    said = {"test": test_probabilities.double(), "train": train_probabilities.double()}
    n_classes = said["train"].shape[1]
    curvature = torch.diag_embed(said["train"]) - said["train"][:, :, None] * said["train"][:, None]
    hessian = torch.einsum("nab,nc,nd->acbd", curvature, inputs["train"], inputs["train"]) / len(train)
    hessian = hessian.reshape(2 * [n_classes * inputs["train"].shape[1]])
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    gradients = {
        part: ((said[part] - functional.one_hot(of_part, n_classes))[:, :, None] * inputs[part][:, None]).flatten(1)
        for part, of_part in zip(("test", "train"), labels, strict=True)
    }
    solved: Tensor = torch.linalg.solve(hessian, gradients["train"].T)
    return (gradients["test"] @ solved).float()


def _with_ones(inputs: Tensor) -> Tensor:
    return functional.pad(inputs.double(), (0, 1), value=1.0)
