"""Validations inside a fit: the examples to explain, and the training examples that pushed them so far.

A validation runs before the checkpoint of its epoch is taken. So its examples are chosen, with their rows of the
batches, while it runs, and explained when there is something to explain them from.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_tracin._compat import logged_step
from lightning_tracin.capture import Captured, checked
from lightning_tracin.explanation import Example, Explanation
from lightning_tracin.losses import MeanLoss, batch_size, labels_of, row_of
from lightning_tracin.methods import method_of
from lightning_tracin.mixin import losses_of
from lightning_tracin.predictions import Outputs
from lightning_tracin.processes import Processes, processes_of
from lightning_tracin.query import TestExamples, scored, weights_kept
from lightning_tracin.report.loggers import log_table, rows_of
from lightning_tracin.result import InfluenceResult
from lightning_tracin.trace import Trace


@dataclass(frozen=True)
class Validated:
    """A validation example.

    Attributes:
        loader: the number of its loader.
        index: its index in the data set where that is known, else its place in the loader's order.
        loss: at the validation.
        prediction: what the model said of it then: the class and its probability, or a value and NaN; NaN where it is
            not known.
    """

    loader: int
    index: int
    loss: float
    prediction: tuple[float, float]


@dataclass(frozen=True)
class Validation:
    """What is left of a validation, to be explained.

    Attributes:
        step: the one that Lightning logs the validation's own metrics under.
        epoch: the one that it ran in.
        examples: in the order in which they are logged, on all processes.
        rows: those of them that this process has seen, each as a batch of its own, by their place among all.
    """

    step: int
    epoch: int
    examples: Sequence[Validated]
    rows: Mapping[int, Any]


class Choice:
    """Chooses examples of one validation, as its batches come.

    Args:
        module: its losses and predictions count; call :meth:`see` in eval mode, without gradients.
        last_layer: name of the linear layer that alone feeds the loss, if it is known.
        wanted: how many of the highest loss; or the indices of those to take from each loader.
        loaders: the validation loaders.
        processes: those that validate together, each a part.
    """

    def __init__(
        self,
        module: nn.Module,
        last_layer: str | None,
        wanted: int | tuple[int, ...],
        loaders: Sequence[Any],
        processes: Processes,
    ) -> None:
        self._losses = losses_of(module)
        self._outputs = Outputs(module, last_layer)
        self._wanted = wanted
        self._processes = processes
        self._sampled = [_sampled(loader) for loader in loaders]
        self._seen: Counter[int] = Counter()
        self._found: dict[tuple[int, int], tuple[Validated, Any]] = {}
        self._not_finite = 0

    def see(self, batch: Any, loader: int) -> None:
        """Look at the next batch of a loader.

        Raises:
            ValueError: if the batch cannot be cut into examples.
        """
        if isinstance(self._wanted, tuple):
            size = batch_size(batch)
            if size is not None and not set(self._numbers(loader, size)).intersection(self._wanted):
                self._seen[loader] += size
                return
        losses, predictions = self._look(batch)
        numbers = self._numbers(loader, len(losses))
        self._seen[loader] += len(losses)
        self._not_finite += int((~torch.isfinite(losses)).sum())
        for place in self._candidates(losses, numbers):
            row = self._cut(batch, place, losses)
            value, confidence = predictions[place].tolist()
            example = Validated(loader, numbers[place], float(losses[place]), (value, confidence))
            self._found[loader, example.index] = (example, row)
        kept = self._in_order([example for example, _ in self._found.values()])
        self._found = {(each.loader, each.index): self._found[each.loader, each.index] for each in kept}

    def made(self, step: int, epoch: int) -> Validation:
        """The choice of all processes."""
        owners: dict[tuple[int, int], int] = {}
        examples: list[Validated] = []
        not_finite = 0
        found = self._processes.gather(([example for example, _ in self._found.values()], self._not_finite))
        for rank, (of_process, bad) in enumerate(found):
            not_finite += bad
            for each in of_process:
                if (each.loader, each.index) not in owners:  # samplers give some twice, so that all have as many
                    owners[each.loader, each.index] = rank
                    examples.append(each)
        examples = self._in_order(examples)
        keys = [(each.loader, each.index) for each in examples]
        rows = {place: self._found[key][1] for place, key in enumerate(keys) if owners[key] == self._processes.rank}
        if not_finite:
            rank_zero_warn(f"The loss of {not_finite} validation examples is NaN or infinite: they are not explained.")
        if isinstance(self._wanted, tuple) and not not_finite:
            missing = sorted(set(self._wanted) - {each.index for each in examples})
            if missing:
                rank_zero_warn(f"log_examples asks for {missing}, but the validation came upon no such examples.")
        return Validation(step, epoch, examples, rows)

    def _look(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The losses (B,) and predictions (B, 2) of a batch; without losses of single examples, row by row."""
        losses = []
        predictions = []
        for part in self._losses.rows(batch) if isinstance(self._losses, MeanLoss) else [batch]:
            with self._outputs.watched():
                losses.append(checked(self._losses(part)).detach().float().cpu())
            predictions.append(self._outputs.predictions(len(losses[-1]), labels_of(part)))
        return torch.cat(losses), torch.cat(predictions)

    def _numbers(self, loader: int, size: int) -> list[int]:
        """The indices of the next examples of a loader."""
        start = self._seen[loader]
        sampled = self._sampled[loader]
        if sampled is not None:
            return sampled[start : start + size]
        return [place * self._processes.size + self._processes.rank for place in range(start, start + size)]

    def _candidates(self, losses: Tensor, numbers: Sequence[int]) -> list[int]:
        """The places in a batch of the examples that may be among those chosen."""
        values = losses.tolist()
        finite = [place for place, loss in enumerate(values) if math.isfinite(loss)]
        if isinstance(self._wanted, tuple):
            return [place for place in finite if numbers[place] in self._wanted]
        least = min((each.loss for each, _ in self._found.values()), default=-torch.inf)
        highest = sorted(finite, key=lambda place: -values[place])[: self._wanted]
        return [place for place in highest if len(self._found) < self._wanted or values[place] > least]

    def _in_order(self, examples: Sequence[Validated]) -> list[Validated]:
        """Of some examples those that are chosen, in the order in which they are logged."""
        wanted = self._wanted
        if isinstance(wanted, tuple):
            return sorted(examples, key=lambda each: (each.loader, wanted.index(each.index)))
        return sorted(examples, key=lambda each: (-each.loss, each.loader, each.index))[:wanted]

    def _cut(self, batch: Any, place: int, losses: Tensor) -> Any:
        """One example as a batch of its own, in memory of its own; the first one is checked to be what it was."""
        row = apply_to_collection(row_of(batch, place, len(losses)), Tensor, torch.clone)
        if not self._found:
            self._check_alone(row, losses[place])
        return row

    def _check_alone(self, row: Any, loss: Tensor) -> None:
        """Check that an example has the loss, cut out of its batch, that it had inside."""
        failure = None
        try:
            alone = checked(self._losses(row)).float().cpu()
            found = f"a loss of {alone.tolist()}"
            same = len(alone) == 1 and bool(torch.isclose(alone[0], loss, rtol=0.05, atol=1e-3))
        except Exception as error:  # from anywhere in the model, which is given what it is not made for
            failure, found, same = error, f"an error ({error})", False
        if not same:
            raise ValueError(
                f"log_examples must cut examples out of the validation batches, but one with loss {float(loss):.4g} in "
                f"its batch gave {found} alone. The first dimension of the batch's tensors must count its examples; "
                "where it does not, use log_examples=0."
            ) from failure


class ValidationLog:
    """Logs, of each validation in a fit, some examples with those that pushed them.

    Args:
        trace: the checkpoints and gradients of the fit.
        module: the module in training.
        examples: how many of the highest loss; or the indices of those to take from each loader.
        k: how many proponents and opponents of each.
    """

    def __init__(self, trace: Trace, module: nn.Module, examples: int | tuple[int, ...], k: int) -> None:
        self._trace = trace
        self._module = module
        self._examples = examples
        self._k = k
        self._choice: Choice | None = None
        self._pending: list[Validation] = []
        self._told: set[str] = set()

    def begin(self, trainer: pl.Trainer) -> None:
        """A validation begins."""
        last = self._trace.layers.get("tracin-last")
        loaders = _flat(trainer.val_dataloaders)
        self._choice = Choice(self._module, last, self._examples, loaders, processes_of(trainer))

    def see(self, batch: Any, loader: int) -> None:
        """Look at the next batch of a loader, in eval mode and without gradients."""
        assert self._choice is not None
        self._choice.see(batch, loader)

    def end(self, trainer: pl.Trainer) -> None:
        """A validation is over: its examples wait until they are logged."""
        assert self._choice is not None
        validation = self._choice.made(logged_step(trainer), trainer.current_epoch)
        self._choice = None
        if validation.examples:
            self._pending.append(validation)

    def log(self, trainer: pl.Trainer, gradients: Callable[[Any], Captured]) -> None:
        """Explain what waits, and hand it to the trainer's loggers, if there is a checkpoint to explain it from.

        Args:
            trainer: its loggers are written to by the first process.
            gradients: of a batch, at the module's present weights.

        Raises:
            ValueError: if a gradient is not finite.
        """
        if not self._pending or not self._trace.checkpoints:
            return
        pending, self._pending = self._pending, []
        processes = processes_of(trainer)
        for validation in pending:
            with processes.together():
                device = trainer.strategy.root_device
                result = explained(validation, self._trace, self._module, self._k, gradients, processes, device)
                if processes.first:
                    self._write(trainer, validation, list(result.explanations(k=self._k)))

    def _write(self, trainer: pl.Trainer, validation: Validation, explanations: Sequence[Explanation]) -> None:
        """Hand the explanations of a validation to each of the trainer's loggers."""
        of_examples = [(each.loader, each.loss) for each in validation.examples]
        rows = rows_of(explanations, of_examples, step=validation.step, epoch=validation.epoch)
        metrics = summary(explanations)
        for logger in trainer.loggers:
            if metrics:
                logger.log_metrics({**metrics, "epoch": validation.epoch}, step=validation.step)
            file = log_table(logger, rows, step=validation.step, root=trainer.default_root_dir)
            logger.save()
            if file is not None and str(file) not in self._told:
                self._told.add(str(file))
                rank_zero_info(f"{type(logger).__name__} takes no tables: influential examples are in {file}.")


def explained(
    validation: Validation,
    trace: Trace,
    module: nn.Module,
    k: int,
    gradients: Callable[[Any], Captured],
    processes: Processes,
    device: torch.device,
) -> InfluenceResult:
    """Score all training examples on a validation's examples, over the checkpoints that there are.

    The module is given the weights of each checkpoint in turn, and in the end its own.

    Args:
        validation: the examples.
        trace: of the fit; the first of its methods is used.
        module: the module in training.
        k: how many proponents and opponents of each example are kept.
        gradients: of a batch, at the module's present weights.
        processes: those that each have some of the rows, and score their share of the training examples.
        device: what multiplies.

    Returns:
        One row for each example, in their order, with the predictions of the validation.

    Raises:
        ValueError: if a gradient is not finite.
    """
    checkpoints = trace.checkpoints
    test = TestExamples(module, method_of(next(iter(trace.layers))), trace)
    with weights_kept(module):
        for checkpoint in checkpoints:
            with processes.together():
                module.load_state_dict(checkpoint.weights(), strict=False)
                for place, row in validation.rows.items():
                    with test.outputs.watched():
                        captured = gradients(row)
                    if captured.first_not_finite() is not None:
                        raise ValueError(
                            f"The loss or gradient of validation example {validation.examples[place].index} is NaN or "
                            f"infinite at the weights of step {checkpoint.step}."
                        )
                    test.take(captured, [place], row)
                test.finish_checkpoint(checkpoint, processes)
    result = scored(test, checkpoints, min(k, trace.n_train), processes, device)
    result.test_indices = torch.tensor([each.index for each in validation.examples])
    result.predictions = torch.tensor([each.prediction for each in validation.examples], dtype=torch.float64)
    return result


def summary(explanations: Sequence[Explanation]) -> dict[str, float]:
    """What curves say of explained validation examples; each as far as labels and predictions are known.

    Returns:
        ``tracin/same_label``, the share of proponents (of positive score) that have the label of their validation
        example; ``tracin/concentration``, how much of all positive score of an example its listed proponents hold, on
        the mean; ``tracin/suspected_label_errors``, how many examples are suspected (see :func:`is_suspected`).
    """
    metrics = {}
    pushed = [[each for each in of.proponents if each.score > 0] for of in explanations]
    same = [
        each.example.label == of.test.label
        for of, proponents in zip(explanations, pushed, strict=True)
        for each in proponents
        if _has_class(of.test) and each.example.label is not None
    ]
    if same:
        metrics["tracin/same_label"] = sum(same) / len(same)
    held = [sum(each.share or 0.0 for each in proponents) for proponents in pushed if proponents]
    if held:
        metrics["tracin/concentration"] = sum(held) / len(held)
    if any(_has_class(of.test) and of.test.confidence is not None for of in explanations):
        metrics["tracin/suspected_label_errors"] = float(sum(map(is_suspected, explanations)))
    return metrics


def is_suspected(explanation: Explanation) -> bool:
    """Whether a validation example's label looks wrong: model and training examples agree on another class.

    The model says another class than the label, and so do the listed training examples, if each votes for its own
    label with the magnitude of its score, that is, with how alike the two are for the model.
    """
    votes: dict[str, float] = defaultdict(float)
    for each in (*explanation.proponents, *explanation.opponents):
        if each.example.label is not None:
            votes[each.example.label] += abs(each.score)
    most = max(votes, key=lambda label: votes[label], default=None)
    return explanation.test.is_mistaken and most == explanation.test.prediction


def _has_class(test: Example) -> bool:
    """Whether a test example's label is a class, not a value that a regression predicts."""
    return test.label is not None and (test.prediction is None or test.confidence is not None)


def _sampled(loader: Any) -> list[int] | None:
    """The data set indices that a loader's sampler gives a process in an epoch, where it gives them each time alike."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return [int(index) for index in sampler] if isinstance(sampler, DistributedSampler) else None


def _flat(loaders: Any) -> list[Any]:
    """The loaders inside of lists and mappings, in the order in which Lightning numbers them."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return [each for part in loaders for each in _flat(part)] if isinstance(loaders, (list, tuple)) else [loaders]
