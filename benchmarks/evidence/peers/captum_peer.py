"""Captum 0.9: TracInCP and TracInCPFast (Pruthi et al. 2020, arXiv 2002.08484)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.evidence.examples import Examples
from benchmarks.evidence.peers.network import Positional, as_tensors, checkpoint_weights


def tracin_cp(
    network: nn.Module,
    weights: Sequence[dict[str, Tensor]],
    rates: Sequence[float],
    test: Examples,
    train: Examples,
    layers: Sequence[str] | None,
    batch_size: int = 32,
) -> Tensor:
    """TracInCP over some layers, biases included.

    Args:
        network: whose weights they are.
        weights: of the checkpoints.
        rates: their learning rates.
        test: what is explained.
        train: the training examples.
        layers: names of the layers; None for all.
        batch_size: of every pass.

    Returns:
        (n_test, n_train) float32.
    """
    from captum.influence import TracInCP

    wrapped = Positional(network)
    tracin = TracInCP(
        wrapped,
        DataLoader(as_tensors(train), batch_size=batch_size),
        [str(number) for number in range(len(weights))],
        checkpoints_load_func=_loading(checkpoint_weights(wrapped, weights), rates),
        layers=None if layers is None else [f"network.{name}" for name in layers],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
    )
    return _scores(tracin, test)


def tracin_cp_fast(
    network: nn.Module,
    weights: Sequence[dict[str, Tensor]],
    rates: Sequence[float],
    test: Examples,
    train: Examples,
    last: str,
    batch_size: int = 64,
) -> Tensor:
    """TracInCPFast at the last layer, which leaves its bias out; as :func:`tracin_cp`."""
    from captum.influence import TracInCPFast

    wrapped = Positional(network)
    tracin = TracInCPFast(
        wrapped,
        wrapped.get_submodule(f"network.{last}"),
        DataLoader(as_tensors(train), batch_size=batch_size),
        [str(number) for number in range(len(weights))],
        checkpoints_load_func=_loading(checkpoint_weights(wrapped, weights), rates),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )
    return _scores(tracin, test)


def _loading(weights: list[dict[str, Tensor]], rates: Sequence[float]) -> Callable[[nn.Module, str], float]:
    """Loads a checkpoint and returns its learning rate, as Captum asks for."""

    def load(network: nn.Module, number: str) -> float:
        network.load_state_dict(weights[int(number)])
        return rates[int(number)]

    return load


def _scores(tracin: object, test: Examples) -> Tensor:
    scores: Tensor = tracin.influence(tuple(as_tensors(test).tensors))  # type: ignore[attr-defined]
    return scores.detach().float()
