"""What a module says of test examples: the loss of each, and the probabilities of its classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional

from lightning_tracin.bridge.compat import batch_to_device
from lightning_tracin.bridge.mixin import labels_of_module, last_layer_of, losses_of, says_its_loss
from lightning_tracin.bridge.observing import Observer
from lightning_tracin.gradients.capture import without_inference_tensors
from lightning_tracin.gradients.eval_mode import gradients_enabled
from lightning_tracin.gradients.layers import layer_name
from lightning_tracin.gradients.losses import NOT_FINITE_ADVICE, Losses, checked_losses, hugging_face_model
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.outputs import are_of_two_classes, output_of
from lightning_tracin.gradients.predictions import PredictionProbe
from lightning_tracin.querying.passes import predict_by
from lightning_tracin.retraining.held_out import HeldOut
from lightning_tracin.retraining.outcomes import Outcome

_TELLING = 1e-3  # of smaller losses rounding tells more than their kind
_ROUNDING = 0.02  # by which multiples of losses in half precision may differ


class Observed:
    """Reads what retrained modules, all of one form, say of the same test examples.

    Args:
        held_out: the test examples.
    """

    def __init__(self, held_out: HeldOut) -> None:
        self._held_out = held_out
        self._last_layer: str | None = None
        self._looked = False
        self._is_binary = False
        self._is_told = True
        self._chosen: str | None = None

    def outcome(self, trainer: pl.Trainer, module: pl.LightningModule) -> Outcome:
        """What a module says, in eval mode.

        Args:
            trainer: runs it, on its own device and in its own precision.
            module: the module.

        Raises:
            ValueError: if there is not one finite loss for each example.
        """
        found: list[_Said] = []

        def step(batch: Any, batch_idx: int) -> None:
            with gradients_enabled(module):
                found.append(self._said(module, without_inference_tensors(batch)))

        predict_by(step, trainer, module, _Copies(self._held_out.batches), None, callbacks=[])
        return self._joined(found)

    def outcome_now(self, trainer: pl.Trainer, module: pl.LightningModule) -> Outcome:
        """What a module says in the middle of a pass that has put it on its device and in eval mode.

        Raises:
            ValueError: if there is not one finite loss for each example.
        """
        batches = (batch_to_device(trainer, module, batch) for batch in _Copies(self._held_out.batches))
        return self._joined([self._said(module, batch) for batch in batches])

    def _joined(self, found: list[_Said]) -> Outcome:
        """What was said of all batches, in the order of results.

        Raises:
            ValueError: if a batch has another number of losses than of examples, or a loss is not finite.
        """
        self._held_out.check_losses([len(each.losses) for each in found])
        losses = torch.cat([each.losses for each in found])[self._held_out.places]
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad):
            raise ValueError(f"The loss of test example {int(bad[0])} is {losses[bad[0]]:g}. {NOT_FINITE_ADVICE}")
        said = [each.classes for each in found if each.classes is not None]
        if len(said) < len(found) or not _are_usual(found):
            return Outcome(losses, None)
        return Outcome(losses, torch.cat(said)[self._held_out.places])

    def _said(self, module: pl.LightningModule, batch: Any) -> _Said:
        """The losses of a batch, and the log probabilities of classes."""
        losses_of_batch = losses_of(module)
        if not self._looked:  # all modules are of one form: it is enough to look once
            self._look(module, losses_of_batch, batch)
        probe = PredictionProbe(module, self._last_layer)
        probe.chosen = self._chosen
        with torch.no_grad():
            losses = checked_losses(probe.watching(losses_of_batch)(batch))
            logits = probe.logits(len(losses), (1, 2))
            if isinstance(losses_of_batch, MeanLoss):  # the mean of the batch, where each example's is wanted
                losses = torch.cat([losses_of_batch(row) for row in losses_of_batch.rows(batch)])
        classes, labels = (None, None) if logits is None else self._classes(module, probe, logits.float(), batch)
        return _Said(losses.float().cpu(), classes, labels)

    def _look(self, module: pl.LightningModule, losses: Losses, batch: Any) -> None:
        """Find the layer that says the classes, and whether labels may be those of two."""
        if isinstance(losses, MeanLoss):
            losses.check(batch)
        with suppress(ValueError):
            self._last_layer = layer_name(module, last_layer_of(module, lambda: losses(batch)))
        labels = [labels_of_module(module, each) for each in self._held_out.batches]
        probe = PredictionProbe(module, self._last_layer)
        self._is_told = Observer(module, probe, lambda: torch.empty(0)).tell_classes(batch)
        self._chosen = probe.chosen
        self._is_binary = all(each is not None and are_of_two_classes(each) for each in labels)
        self._looked = True

    def _classes(
        self, module: pl.LightningModule, probe: PredictionProbe, logits: Tensor, batch: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B, C) log probabilities, None if an example's output is not one of several classes; labels of one of two."""
        labels = labels_of_module(module, batch)
        if labels is None:
            return None, None
        model = hugging_face_model(module) if probe.from_hugging_face else None
        output = output_of(logits, labels, model, own_loss=says_its_loss(module), may_be_binary=self._is_binary)
        if output.kind == "class" and not labels.is_floating_point():
            if not self._is_told:
                return None, None
            return output.logits.log_softmax(1).cpu(), None
        if output.kind != "binary":
            return None, None
        said = functional.logsigmoid(torch.cat([-output.logits, output.logits], 1)).cpu()
        return said, labels.flatten().cpu().double().nan_to_num(-1).long()


@dataclass(frozen=True)
class _Said:
    """What a module says of a batch.

    Attributes:
        losses: (B,).
        classes: (B, C) log probabilities; None if there are none.
        labels: (B,) where a single number says which of two classes; else None.
    """

    losses: Tensor
    classes: Tensor | None
    labels: Tensor | None


def _are_usual(found: Sequence[_Said]) -> bool:
    """Whether the losses of two classes are minus log probabilities, or a multiple for each: a squared error is not."""
    ratios: dict[int, list[float]] = {0: [], 1: []}
    n_of_label = {0: 0, 1: 0}
    for each in found:
        if each.labels is None or each.classes is None:
            continue
        for loss, said, label in zip(each.losses.tolist(), each.classes.tolist(), each.labels.tolist(), strict=True):
            if label not in ratios:  # -1 is none
                continue
            n_of_label[label] += 1
            if -said[label] > _TELLING:
                ratios[label].append(loss / -said[label])
    return all(_is_one_multiple(of_label, n_of_label[label] == 1) for label, of_label in ratios.items() if of_label)


def _is_one_multiple(ratios: Sequence[float], is_alone: bool) -> bool:
    """Whether the losses of a label are one multiple of minus its log probabilities; a hinge of 0 is none.

    Args:
        ratios: of losses to minus log probabilities.
        is_alone: whether there is one test example of the label, whose loss is a multiple whatever it is: only 1 tells.
    """
    if is_alone:
        return abs(ratios[0] - 1) <= _ROUNDING
    return min(ratios) > 0 and max(ratios) <= (1 + _ROUNDING) * min(ratios)


class _Copies:
    """Copies of batches: a module's hooks may change what they are given."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(copy.deepcopy(batch) for batch in self._batches)
