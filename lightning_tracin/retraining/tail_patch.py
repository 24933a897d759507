"""Tail-patch: one more step on a training example, and what that does to a test example. No retraining."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tracin.bridge.compat import lightning_of
from lightning_tracin.bridge.loaders import loader_of_batches
from lightning_tracin.bridge.mixin import losses_of
from lightning_tracin.checked_numbers import real_number
from lightning_tracin.gradients.eval_mode import gradients_enabled
from lightning_tracin.querying.passes import attribute_set
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.retraining.checks import (
    check_module,
    check_training_set,
    checked_rows,
    require_proponents,
    require_same_test,
    require_trace,
)
from lightning_tracin.retraining.fits import QUIET, Build, apart, built
from lightning_tracin.retraining.held_out import held_out
from lightning_tracin.retraining.observed import Observed
from lightning_tracin.retraining.outcomes import Outcome
from lightning_tracin.retraining.targets import common_quantity, log_probabilities_of
from lightning_tracin.storage.checkpoint import Checkpoint


def tail_patch_gains(
    result: InfluenceResult,
    build: Build,
    test: Any,
    k: int = 20,
    *,
    train_indices: Tensor | None = None,
    test_indices: Sequence[int] | None = None,
    learning_rate: float | None = None,
) -> Tensor:
    """By how much one more step on each of a test example's proponents makes its target likelier (Chang et al. 2024).

    The model has the last checkpoint's weights, and again for each example; the step is that of the module's own
    optimizer, without a past. It is cheap, and says that an example *can* push the target, not that it did:
    :func:`does_it_matter` tells that. A step that gains nothing for proponents, or no less for random examples
    (``train_indices``), is a reason to doubt the scores. What to make of the gains is
    :func:`~lightning_tracin.metrics.functional.tail_patch`.

    Args:
        result: of ``trainer.influence``, with its trace.
        build: ``build(indices, seed)`` as for :func:`does_it_matter`.
        test: the result's test examples, with their labels.
        k: how many proponents.
        train_indices: (n, k) int64, other training examples than the proponents.
        test_indices: which rows of the result; all by default.
        learning_rate: of the step; by default of each parameter group its own, the mean of the trace's checkpoints.

    Returns:
        (n, k) float32, the log probability of the target after the step minus before, strongest proponent first; where
        the module says no class, the loss before minus after.

    Raises:
        TypeError: if ``build`` takes or returns something else, the test examples come in something else, or
            ``train_indices`` is no tensor.
        ValueError: if there is no trace with weights, the test set is not that of the result, or ``train_indices`` has
            another shape, or holds what is no training example.
    """
    trace = require_trace(result)
    rows = checked_rows(result, test_indices)
    if train_indices is None:
        require_proponents(result, rows, k)
        chosen = result.proponents(k).indices[rows]
    else:
        chosen = _checked_indices(train_indices, len(rows), result.n_train)
    checkpoints = trace.checkpoints
    if learning_rate is None:
        rates, rate = _rates_of_groups(checkpoints), sum(each.learning_rate for each in checkpoints) / len(checkpoints)
    else:
        rates, rate = {}, real_number("learning_rate", learning_rate)
    with apart():
        module, loader = built(build, list(range(result.n_train)), 0, result.n_train)
        check_training_set(trace, loader)
        held = held_out(test, lambda: loader)
        require_same_test(result, held, module)
        check_module(trace, module)
        module.load_state_dict(checkpoints[-1].weights(), strict=False)
        stepped_on = torch.unique(chosen)
        patch = _TailPatch(module, Observed(held), rates, rate)
        patch.run(loader_of_batches(loader, [[each] for each in stepped_on.tolist()]))
    quantity = common_quantity(patch.outcomes)
    said = torch.stack([log_probabilities_of(result, rows, each, quantity) for each in patch.outcomes])
    gains = said[1:] - said[0]
    return gains[torch.searchsorted(stepped_on, chosen), torch.arange(len(rows))[:, None]]


def _rates_of_groups(checkpoints: Sequence[Checkpoint]) -> dict[tuple[int, int], float]:
    """The mean learning rate of each parameter group, by the numbers of its optimizer and of itself there."""
    means: dict[tuple[int, int], list[float]] = defaultdict(list)
    for checkpoint in checkpoints:
        sums: dict[tuple[int, int], float] = defaultdict(float)
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for (_, optimizer, rates, _), n in checkpoint.counted_steps:
            for group, rate in enumerate(rates):
                sums[optimizer, group] += n * rate
                counts[optimizer, group] += n
        for key, total in sums.items():
            means[key].append(total / counts[key])
    return {key: fmean(of_checkpoints) for key, of_checkpoints in means.items()}


def _checked_indices(asked: Tensor, n: int, n_train: int) -> Tensor:
    """Training examples that were asked for instead of proponents, (n, k) int64.

    Raises:
        TypeError: if they come in something else than a tensor.
        ValueError: if the tensor has another shape, or holds what is no training example.
    """
    if not isinstance(asked, Tensor):
        raise TypeError(f"train_indices must be a tensor of shape (n, k), but got {type(asked).__name__}.")
    if asked.dim() != 2 or not asked.shape[1] or asked.is_floating_point() or asked.dtype == torch.bool:
        raise ValueError(
            f"train_indices must be whole numbers of shape (n, k), but got {asked.dtype} of shape {tuple(asked.shape)}."
        )
    if len(asked) != n:
        raise ValueError(f"train_indices must have a row for each of {n} test examples, but has {len(asked)}.")
    bad = asked[(asked < 0) | (asked >= n_train)]
    if len(bad):
        raise ValueError(
            f"train_indices must be numbers of training examples, from 0 to {n_train - 1}, but got {int(bad[0])}."
        )
    return asked.long().cpu()


class _TailPatch:
    """Takes one step on each batch, looks at the test examples, and takes the step back.

    It stands in for the ``training_step`` of a fit, since Lightning makes optimizers, and what their schedules ask of
    the trainer, in a fit alone.

    Args:
        module: has the weights that each step begins at.
        observed: looks at the test examples.
        rates: of the steps, by the numbers of an optimizer and of a parameter group.
        other: the rate of groups that are not among these.

    Attributes:
        outcomes: before all steps, and after each.
    """

    def __init__(
        self, module: pl.LightningModule, observed: Observed, rates: Mapping[tuple[int, int], float], other: float
    ) -> None:
        self._module = module
        self._observed = observed
        self._rates = rates
        self._other = other
        self._trainer: pl.Trainer = lightning_of(module).Trainer(max_epochs=1, **QUIET)
        self.outcomes: list[Outcome] = []

    def run(self, loader: Any) -> None:
        """Take a step on each of a loader's batches."""
        own = self._module.training_step, self._module.automatic_optimization

        def step(batch: Any, batch_idx: int) -> None:
            with _optimizing(self._module, *own):  # without the mixin, losses are what its own training_step returns
                self._step(batch)

        with _optimizing(self._module, step, automatic=False):
            self._trainer.fit(self._module, loader)

    def _step(self, batch: Any) -> None:
        module = self._module
        weights = {name: each.detach().clone() for name, each in module.named_parameters()}
        made: Any = module.optimizers(use_pl_optimizer=False)
        optimizers: list[Optimizer] = made if isinstance(made, list) else [made]
        with gradients_enabled(module):
            if not self.outcomes:
                self.outcomes.append(self._observed.outcome_now(self._trainer, module))
            torch.autograd.backward(losses_of(module)(batch).sum())
            for number, optimizer in enumerate(optimizers):
                for place, group in enumerate(optimizer.param_groups):
                    group["lr"] = self._rates.get((number, place), self._other)
                optimizer.step()
                optimizer.zero_grad()
                optimizer.state.clear()  # the next step has no past either
            self.outcomes.append(self._observed.outcome_now(self._trainer, module))
        with torch.no_grad():
            for name, each in module.named_parameters():
                each.copy_(weights[name])


@contextmanager
def _optimizing(module: pl.LightningModule, step: Callable[..., Any], automatic: bool) -> Iterator[None]:
    """Set the ``training_step`` of a module, and whether Lightning makes its steps, for a while."""
    before = module.automatic_optimization
    module.automatic_optimization = automatic
    try:
        with attribute_set(module, "training_step", step):
            yield
    finally:
        module.automatic_optimization = before
