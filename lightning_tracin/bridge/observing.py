"""What a module says of a batch, which may have no labels: a forward pass, observed, and what its numbers mean.

A single output stands for two classes, by its sigmoid, or is a value. Training's labels and the batch's tell, of
whatever type: all of them are 0 or 1, or they are not. Where they are, the losses tell a regression of such labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_tracin.bridge.mixin import (
    TracInMixin,
    labels_of_module,
    last_layer_of,
    losses_of,
    says_its_loss,
    with_labels_of,
)
from lightning_tracin.gradients.batches import batch_size, tensors_of
from lightning_tracin.gradients.capture import without_inference_tensors
from lightning_tracin.gradients.layers import layer_name
from lightning_tracin.gradients.losses import called_with, checked_losses, hugging_face_model, writes_apart
from lightning_tracin.gradients.outputs import Output, are_distances, are_none, are_whole, output_of
from lightning_tracin.gradients.predictions import PredictionProbe
from lightning_tracin.parallel.fsdp import call_in_forward_pass, is_fsdp


class Observer:
    """Sees what a module says.

    Args:
        module: the module, in eval mode.
        probe: sees the outputs of its layers.
        training_labels: gives (n,) labels of training examples, NaN where they are not one number. They tell whether a
            single output stands for two classes, and are not read where nothing depends on it.
    """

    def __init__(self, module: nn.Module, probe: PredictionProbe, training_labels: Callable[[], Tensor]) -> None:
        self.module = module
        self.probe = probe
        self.losses = losses_of(module)
        self._read_training_labels = training_labels
        self._way: Callable[[Any], Tensor] | None = None
        self._stand_in: Tensor | None = None  # the labels of the last batch that had none
        self._is_told: bool | None = None  # whether some logits are those of classes, once a batch has told

    @property
    def has_own_loss(self) -> bool:
        """Whether the module says itself what an example's loss is."""
        own = getattr(type(self.module), "influence_loss", None)
        return own is not None and own is not TracInMixin.influence_loss

    def labels(self, batch: Any) -> Tensor | None:
        """The batch's labels, if it has any."""
        return labels_of_module(self.module, batch)

    def takes(self, batch: Any) -> bool:
        """Whether the module has losses for a batch as it is, which may need no labels."""
        return self.labels(batch) is not None or self._way == self._by_loss

    def labels_of(self, batch: Any, number: int) -> Tensor:
        """A label for each example, in the form of the batch's own, or, where it has none, as the module takes them."""
        labels = self.labels(batch)
        if labels is not None:
            return torch.full_like(labels, number)
        device = tensors_of(batch)[0].device
        like = torch.zeros(1, dtype=torch.long) if self._stand_in is None else self._stand_in
        return torch.full((batch_size(batch) or 0, *like.shape[1:]), number, dtype=like.dtype, device=device)

    def predictions(self, labels: Tensor | None, losses: Tensor) -> Tensor:
        """The predictions of a batch that the probe has just seen, see :meth:`PredictionProbe.predictions`.

        Args:
            labels: the batch's; None if it has none.
            losses: (B,) the module's own, of these labels.
        """
        logits = self.probe.logits(len(losses), (1, 2))
        meant = None if logits is None else self._meant(logits, labels, labels, losses)
        if meant is not None and (not meant.is_told or (meant.kind == "value" and meant.n_classes > 1)):
            return torch.full((len(losses), 2), torch.nan, dtype=torch.float64)
        return self.probe.predictions(len(losses), labels, is_binary=meant is not None and meant.kind == "binary")

    def tell_classes(self, batch: Any, labels: Tensor | None = None) -> bool:
        """Find out, by a first batch with labels, which of the outputs that are seen are those of the classes.

        It takes one more pass of that batch, inside of ``gradients_enabled``. Sharded modules are taken at their word.

        Args:
            batch: the module's.
            labels: those in it, where they were put there.

        Returns:
            Whether the outputs say classes, as far as is known.
        """
        if self._is_told is not None or is_fsdp(self.module):
            return self._is_told is not False
        labels = self.labels(batch) if labels is None else labels
        if labels is None or not _are_single(labels):
            return True
        with torch.enable_grad(), self.probe.watched(differentiable=True):
            losses = checked_losses(self.losses(without_inference_tensors(batch)))
            logits = self.probe.logits(len(losses), (2,))
            if logits is None or logits.shape[1] == 1 or self._meant(logits, labels, labels, losses).kind != "class":
                return True
            # While it is watched: where parts are computed again in the backward pass, they must save the same tensors.
            self._is_told = self.probe.choose(losses, labels.detach().cpu().double().reshape(-1))
        return self._is_told is not False

    def warn_if_untold(self, batch: Any) -> None:
        """Warn if a first batch with labels tells that no output is that of the classes; see :meth:`tell_classes`."""
        if self._is_told is None and not self.tell_classes(batch):
            rank_zero_warn(
                f"What {type(self.module).__name__} says of an example is not known: its losses are not those that are "
                "usual in classification at the outputs that are seen, those of its last linear layer or named logits. "
                "Results have no predictions. Let forward return an object with the logits of the classes, and "
                "influence_loss take them from there."
            )

    def output(self, batch: Any) -> Output:
        """What the module says of a batch, with its graph where gradients are enabled.

        Raises:
            ValueError: if it cannot be seen, or if nothing tells what it means.
        """
        losses = self._run(batch)
        answers = self.probe.answer_logits(len(losses))
        if answers is not None:
            return Output("answer", answers)
        logits = self.probe.logits(len(losses))
        if logits is None and not self.probe.knows_last_layer and not is_fsdp(self.module):
            self._find_last_layer(batch)
            losses = self._run(batch)
            logits = self.probe.logits(len(losses))
        if logits is None:
            raise ValueError(
                f"What {type(self.module).__name__} says cannot be seen. It is seen where the loss comes from one "
                "linear layer, with one row for each example, or where the module returns an object with logits. "
                'target="label" does not need it.'
            )
        own = self.labels(batch)
        labels = self._stand_in if own is None else own
        output = self._meant(logits, own, labels, losses)
        if labels is None and output.kind == "class" and self._way == self._by_forward and not self._has_single_labels:
            raise ValueError(
                f"Whether {type(self.module).__name__} says one class or a set of them cannot be told: this batch has "
                "no labels, and those of training are not one number for each example. Set the model's "
                "config.problem_type, or give the test examples labels in the form of training's."
            )
        return output

    def losses_with(self, batch: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of a batch with other labels, and what the module says there, one row for each example.

        Raises:
            ValueError: if it has no losses then.
        """
        changed = with_labels_of(self.module, batch, labels)
        try:
            with self.probe.watched():
                losses = checked_losses(self.losses(changed))
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(self.module).__name__} has no loss for a batch with other labels: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. Override influence_with_labels(batch, labels) to return the batch with "
                "these labels in the place of its own."
            ) from error
        answers, logits = self.probe.answer_logits(len(losses)), self.probe.logits(len(losses))
        said = logits if answers is None else answers
        return losses, losses if said is None else said

    @cached_property
    def _training_labels(self) -> Tensor:
        return self._read_training_labels()

    @property
    def n_classes_trained(self) -> int | None:
        """How many classes training's labels tell of; None if they are not known."""
        known = self._training_labels[~self._training_labels.isnan()]
        return int(known.max()) + 1 if len(known) else None

    @property
    def _has_single_labels(self) -> bool:
        """Whether training's labels are one number for each example, as far as they are known."""
        return not len(self._training_labels) or not bool(self._training_labels.isnan().all())

    def _meant(self, logits: Tensor, own: Tensor | None, labels: Tensor | None, losses: Tensor) -> Output:
        """What logits mean.

        Args:
            logits: of a batch.
            own: its labels, if it has any.
            labels: those that the pass took, which may stand for them.
            losses: (B,) of that pass, NaN if it had none.
        """
        model = hugging_face_model(self.module) if self.probe.from_hugging_face else None
        may_be_binary = logits.numel() == len(logits) and self._may_be_binary(own)
        output = output_of(logits, labels, model, own_loss=says_its_loss(self.module), may_be_binary=may_be_binary)
        if output.kind == "binary" and labels is not None and are_distances(losses, output.logits, labels):
            return replace(output, kind="value")
        if output.kind == "class":
            if (own is None or own.is_floating_point()) and not are_whole(self._training_labels):
                return replace(output, kind="value")
            return replace(output, is_told=self._is_told is not False)
        return output

    def _may_be_binary(self, own: Tensor | None) -> bool:
        """Whether training's labels are 0 and 1, or are not known where the batch has labels of its own."""
        known = self._training_labels[~self._training_labels.isnan()]
        return bool(((known == 0) | (known == 1)).all()) and (len(known) > 0 or own is not None)

    def _find_last_layer(self, batch: Any) -> None:
        """Let the probe observe the one linear layer that feeds the loss, if there is one."""
        labelled = batch if self.takes(batch) else with_labels_of(self.module, batch, self.labels_of(batch, 0))
        with suppress(ValueError), torch.enable_grad():
            self.probe.look_at(layer_name(self.module, last_layer_of(self.module, lambda: self.losses(labelled))))

    def _run(self, batch: Any) -> Tensor:
        """A forward pass of a batch, seen by the probe; (B,) its losses, NaN where it has none."""
        labels = self.labels(batch)
        if labels is not None:
            return self._by_loss(
                with_labels_of(self.module, batch, labels.clamp(min=0)) if lacks_labels(labels) else batch
            )
        if self._way is not None:
            return self._way(batch)
        model = hugging_face_model(self.module)
        if writes_apart(model):
            raise ValueError(
                f"{type(model).__name__} reads and writes, and what it reads of its own text are labels. Give the test "
                "examples labels, such as what model.generate writes."
            )
        failure: Exception | None = None
        for way in self._ways(batch):
            try:
                losses = way(batch)
            except Exception as error:  # labels of this form are not the module's
                failure = failure or error
                continue
            self._way = way
            return losses
        raise ValueError(
            f"{type(self.module).__name__} cannot be run on a test batch without labels: {type(failure).__name__}: "
            f"{str(failure).rstrip('.')}. Override influence_with_labels(batch, labels) to return the batch with "
            "labels, or give the test examples labels, which do not matter here."
        ) from failure

    def _ways(self, batch: Any) -> Iterator[Callable[[Any], Tensor]]:
        """How a module may be run on a batch whose labels are not known, the likeliest first."""
        yield self._by_loss  # it may have some in a form that nothing tells, or need none
        is_forwarded = isinstance(batch, Mapping) and hugging_face_model(self.module) is not None
        if is_forwarded and not self.has_own_loss:
            yield self._by_forward
        for dtype in (torch.long, torch.float32):
            yield partial(self._by_labels, dtype=dtype)
            yield partial(self._by_labels, dtype=dtype, by_output=True)
        if is_forwarded:
            yield self._by_forward

    def _by_loss(self, batch: Any) -> Tensor:
        with self.probe.watched():
            return checked_losses(self.losses(batch)).detach()

    def _by_forward(self, batch: Any) -> Tensor:
        with self.probe.watched():
            call_in_forward_pass(self.module, partial(called_with, self.module), batch)
        return torch.full((batch_size(batch) or 0,), torch.nan)

    def _by_labels(self, batch: Any, *, dtype: torch.dtype, by_output: bool = False) -> Tensor:
        """With labels of zero: one for each example, or one for each of its outputs, which such a pass shows."""
        labels = torch.zeros(batch_size(batch) or 0, dtype=dtype, device=tensors_of(batch)[0].device)
        if by_output:
            with suppress(Exception):
                self._by_loss(with_labels_of(self.module, batch, labels))
            seen = self.probe.logits(len(labels))
            labels = labels if seen is None else labels.new_zeros(seen.shape[:2])
        losses = self._by_loss(with_labels_of(self.module, batch, labels))
        self._stand_in = labels
        return losses


def _are_single(labels: Tensor) -> bool:
    """Whether labels are one number for each example."""
    return labels.dim() > 0 and labels.numel() == len(labels) and not labels.is_complex()


def lacks_labels(labels: Tensor) -> bool:
    """Whether numbers of classes, one for each example, are none for some: data sets write -1 there, of any type."""
    values = labels.detach().cpu().double()
    return values.numel() == len(values) and bool(are_none(values).any())
