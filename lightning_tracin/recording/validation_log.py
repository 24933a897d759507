"""Validations inside a fit: the examples to explain, and the training examples that pushed them so far.

A validation runs before the checkpoint of its epoch is taken. So its examples are chosen, with their rows of the
batches, while it runs, and explained when there is something to explain them from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from shutil import copyfile
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_tracin.bridge.compat import at_step, logged_step
from lightning_tracin.bridge.mixin import tokenizer_of
from lightning_tracin.bridge.module_gradients import ModuleGradients, inside_fit
from lightning_tracin.bridge.observing import Observer
from lightning_tracin.bridge.queries import Queries, first_labels, probe_of, result_of, weights_kept
from lightning_tracin.bridge.strategy import processes_of
from lightning_tracin.parallel.processes import Processes
from lightning_tracin.recording.loggers import PAGE, log_page, log_table, logger_folder, rows_of
from lightning_tracin.recording.plan import RecordingPlan
from lightning_tracin.recording.validation import Choice, Validation, flat_loaders
from lightning_tracin.report.explanation import Example, Explanation
from lightning_tracin.results.excluded_words import with_ids_of
from lightning_tracin.results.reader import RawText
from lightning_tracin.results.result import InfluenceResult
from lightning_tracin.scoring.kernels import kernels_of
from lightning_tracin.scoring.naming import method_at
from lightning_tracin.scoring.terms import sites_of
from lightning_tracin.storage.checkpoint import Checkpoint
from lightning_tracin.storage.scratch import Scratch
from lightning_tracin.storage.trace import Trace


class ValidationLog:
    """Logs, of each validation in a fit, some examples with those that pushed them.

    Args:
        trace: the checkpoints and gradients of the fit.
        gradients: takes those of the module in training.
        plan: says which examples are logged, with how many proponents and opponents, by which method, and with which
            texts.
    """

    def __init__(self, trace: Trace, gradients: ModuleGradients, plan: RecordingPlan) -> None:
        self._trace = trace
        self._gradients = gradients
        self._examples = plan.log_examples
        self._k = plan.log_k
        self._plan = plan.log
        self._val_texts: Sequence[RawText] | None = None
        self._choice: Choice | None = None
        self._pending: list[Validation] = []
        self._told: set[str] = set()
        self._last: tuple[Validation, InfluenceResult] | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        """A validation begins."""
        loaders = flat_loaders(trainer.val_dataloaders)
        module = self._gradients.module
        self._val_texts = self._texts_of(loaders)
        observer = Observer(module, probe_of(module, self._trace), partial(first_labels, self._trace))
        self._choice = Choice(observer, self._examples, loaders, processes_of(trainer))

    def see(self, batch: Any, loader: int) -> None:
        """Look at the next batch of a loader, in eval mode and without gradients."""
        assert self._choice is not None
        self._choice.see(batch, loader)

    def end(self, trainer: pl.Trainer) -> None:
        """A validation is over: its examples wait until they are logged."""
        assert self._choice is not None
        validation = self._choice.choose(logged_step(trainer), trainer.current_epoch)
        self._choice = None
        if validation.examples:
            self._pending.append(validation)

    def log(self, trainer: pl.Trainer) -> None:
        """Explain what waits, and hand it to the trainer's loggers, if there is a checkpoint to explain it from.

        Args:
            trainer: its loggers are written to by the first process.
        """
        checkpoints = self._trace.checkpoints if self._pending else []
        if not checkpoints:
            return
        pending, self._pending = self._pending, []
        processes = processes_of(trainer)
        for chosen in pending:
            with processes.synchronized():
                validation, test = self._with_gradients(trainer, chosen, checkpoints, processes)
                if not validation.examples:
                    continue
                result = self._explained(trainer, validation, test, processes)
                if processes.first:
                    self._write(trainer, validation, list(result.explanations(k=self._k)))
                    self._last = validation, result

    def log_page(self, trainer: pl.Trainer) -> None:
        """Write a page of the last validation that was logged, and hand it to the loggers that take files."""
        if self._last is None or not trainer.loggers:
            return
        validation, result = self._last
        pages = [logger_folder(logger, trainer.default_root_dir) / PAGE for logger in trainer.loggers]
        first = result.to_html(pages[0], k=self._k, title=f"Validation at step {validation.step}")
        for logger, page in zip(trainer.loggers, pages, strict=True):
            if page != first:
                page.parent.mkdir(parents=True, exist_ok=True)
                copyfile(first, page)
            if not log_page(logger, page, step=validation.step):
                rank_zero_info(f"A page of the last validation's influential examples is in {page}.")

    def _with_gradients(
        self, trainer: pl.Trainer, validation: Validation, checkpoints: Sequence[Checkpoint], processes: Processes
    ) -> tuple[Validation, Queries]:
        """A validation without the examples whose gradients are not finite, and the gradients of the others.

        By default the first of the trace's sites counts.
        """
        module = self._gradients.module
        asked = self._plan.method or method_at(self._trace.sites[0])
        asked = with_ids_of(asked, self._trace, checkpoints, tokenizer_of(module))
        while True:
            test = Queries(module, asked, self._trace)
            with weights_kept(module):
                not_finite = self._take(trainer, validation, test, checkpoints, processes)
            if not not_finite:
                return validation, test
            indices = ", ".join(str(validation.examples[place].index) for place in sorted(not_finite))
            rank_zero_warn(
                f"The gradient of validation example {indices} is NaN or infinite at the weights of a checkpoint: it "
                "is not explained."
            )
            validation = validation.without(not_finite)
            if not validation.examples:
                return validation, test

    def _take(
        self,
        trainer: pl.Trainer,
        validation: Validation,
        test: Queries,
        checkpoints: Sequence[Checkpoint],
        processes: Processes,
    ) -> set[int]:
        """Take the gradients of a validation's examples at the weights of each checkpoint, which stay with the module.

        Returns:
            The places of examples, seen by any process, whose gradients are not finite, after which nothing is taken.
        """
        module = self._gradients.module
        gradients = self._gradients.at(sites_of(test.method, self._trace.sites), test.probe)
        for checkpoint in checkpoints:
            with processes.synchronized(), at_step(trainer, checkpoint.step, checkpoint.epoch):
                module.load_state_dict(checkpoint.weights(), strict=False)
                not_finite: set[int] = set()
                for place, row in validation.rows.items():
                    with inside_fit(trainer, module):
                        captured = gradients.capture(row)
                    if captured.first_not_finite() is None:
                        test.take(captured, [place], row)
                    else:
                        not_finite.add(place)
                not_finite.update(*processes.gather(not_finite))
                if not_finite:
                    return not_finite
                test.finish_checkpoint(checkpoint, processes)
        return set()

    def _explained(
        self, trainer: pl.Trainer, validation: Validation, test: Queries, processes: Processes
    ) -> InfluenceResult:
        """All training examples scored on a validation's examples, over the checkpoints that there are.

        The result has a row for each example, in their order, with the validation's predictions.
        """
        device = trainer.strategy.root_device
        kernels = kernels_of(test.method, processes, device, keep=False)
        # A layer that training has not moved yet gives scores of 0: that ends no recording.
        test.score(min(self._k, self._trace.n_train), processes, device, kernels=kernels, strict=False)
        result = result_of([test], [test.word_gradients()], Scratch())
        result.test_indices = torch.tensor([each.index for each in validation.examples])
        result.predictions = torch.tensor([each.prediction for each in validation.examples], dtype=torch.float64)
        if self._plan.train is not None or self._val_texts is not None:
            return result.with_texts(self._plan.train, self._val_texts)
        return result

    def _texts_of(self, loaders: Sequence[Any]) -> Sequence[RawText] | None:
        """The raw texts of the validation examples, where they are those of the only loader."""
        texts = self._plan.val
        if texts is None or (len(loaders) == 1 and len(texts) == len(getattr(loaders[0], "dataset", ()))):
            return texts
        if "val" not in self._told:
            self._told.add("val")
            rank_zero_warn(
                f'log_texts has {len(texts)} texts of "val", which are not those of one validation loader: tokens of '
                "the validation examples are shown."
            )
        return None

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
    # Shares are rounded, so that those of all proponents may add up to a little more than 1.
    held = [min(1.0, sum(each.share or 0.0 for each in proponents)) for proponents in pushed if proponents]
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
