"""kronfluence 1.0: EK-FAC influence functions (Grosse et al. 2023, arXiv 2308.03296) at the end of training."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence.examples import Examples
from benchmarks.evidence.peers.network import Positional, as_tensors


def ek_fac(
    network: nn.Module, test: Examples, train: Examples, batch_size: int = 64, damping: float | None = None
) -> Tensor:
    """Scores over all linear and convolution layers; kronfluence knows no embedding tables.

    Args:
        network: with its weights.
        test: what is explained; the measurement is the loss.
        train: the training examples, which the factors are of, too.
        batch_size: of every pass.
        damping: None for kronfluence's own choice, a tenth of the mean eigenvalue of each layer (its default is
            1e-8).

    Returns:
        (n_test, n_train) float32.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task = _task()
    model = prepare_model(Positional(network, flat_convolutions=True), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "study", model, task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder
        )
        torch.manual_seed(0)  # The factors are of labels that are drawn from what the model says.
        analyzer.fit_all_factors(
            "ekfac", as_tensors(train), per_device_batch_size=batch_size, factor_args=FactorArguments("ekfac")
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            as_tensors(test),
            as_tensors(train),
            per_device_query_batch_size=len(test),
            per_device_train_batch_size=batch_size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores.float()


def _task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):  # type: ignore[misc]
        """Cross-entropy."""

        def compute_train_loss(self, batch: list[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            *inputs, labels = batch
            logits = model(*inputs)
            if sample:
                labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            return functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()
