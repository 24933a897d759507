"""A model's predictions, observed by hooks in the forward pass that computes the losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.layers import named_layer
from lightning_tracin.gradients.losses import Losses, answer_logits, hugging_face_model, output_entry


class PredictionProbe:
    """Reads predictions from the outputs of a module's layers.

    The logits come from the first of these that gives one row for each example: the only linear layer that feeds the
    loss directly, the model of transformers inside the module, and the module itself if its output has ``logits``.

    Args:
        module: the module.
        last_layer: name of the only linear layer that feeds the loss directly; None if it is not known.
    """

    def __init__(self, module: nn.Module, last_layer: str | None) -> None:
        self._module = module
        self._name = last_layer
        self._last_layer: nn.Module | None = None
        self._hugging_face: nn.Module | None = None
        self._outputs: dict[nn.Module, list[Any]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the outputs of the observed modules while the context lasts."""
        # The modules are looked up each time, because a module's setup hook may have rebuilt them.
        self._last_layer = None if self._name is None else named_layer(self._module, self._name)
        self._hugging_face = hugging_face_model(self._module)
        observed = (self._last_layer, self._hugging_face, self._module)
        self._outputs = {submodule: [] for submodule in observed if submodule is not None}
        with ExitStack() as hooks:
            for submodule, outputs in self._outputs.items():
                hooks.callback(submodule.register_forward_hook(partial(_append_output, outputs)).remove)
            yield

    def watching(self, losses: Losses) -> Losses:
        """The same losses, whose forward pass is observed; a backward pass, which may recompute layers, is not."""

        def watched(batch: Any) -> Tensor:
            with self.watched():
                return losses(batch)

        return watched

    def predictions(self, n_examples: int, labels: Tensor | None) -> Tensor:
        """The prediction for each example of the batch that was observed.

        Args:
            n_examples: number of examples in the batch.
            labels: the batch's labels, whose type distinguishes classification from regression; None if unknown.

        Returns:
            (n_examples, 2) float64: the class and its probability, or a regression's value and NaN; of a question,
            where the likeliest answer starts, and that answer's probability. All are NaN if there is not exactly one
            prediction for each example (token classification, several labels).
        """
        answers = [found for outputs in self._outputs.values() if (found := _answers(outputs, n_examples)) is not None]
        if answers:
            return answers[0]
        candidates = (self._logits(submodule, n_examples) for submodule in self._outputs)
        logits = next((candidate for candidate in candidates if candidate is not None), None)
        unknown = torch.full((n_examples, 2), torch.nan, dtype=torch.float64)
        if logits is None or (labels is not None and labels.dim() > 1 and labels.shape[-1] > 1):
            return unknown
        if logits.shape[1] > 1:
            most_likely = _probabilities(logits).max(1)
            return torch.stack([most_likely.indices.double(), most_likely.values], 1)
        if self._hugging_face is None and labels is not None and not labels.is_floating_point():
            positive = logits[:, 0].sigmoid()
            return torch.stack([(positive > 0.5).double(), torch.maximum(positive, 1 - positive)], 1)
        return torch.stack([logits[:, 0], unknown[:, 1]], 1)

    def _logits(self, submodule: nn.Module, n_examples: int) -> Tensor | None:
        """(n_examples, n_classes) float64; None if a module was not called exactly once, or has another output."""
        if len(self._outputs[submodule]) != 1:
            return None
        output = self._outputs[submodule][0]
        if submodule is not self._last_layer:
            output = output_entry(output, "logits")
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() not in (1, 2):
            return None
        return output.detach().cpu().double().reshape(n_examples, -1) if len(output) == n_examples else None


def _append_output(outputs: list[Any], _: nn.Module, __: Any, output: Any) -> None:
    outputs.append(output)


def _answers(outputs: list[Any], n_examples: int) -> Tensor | None:
    """(n_examples, 2) where the likeliest answers start, and their probabilities; None if the output has none.

    An answer does not end before it starts.
    """
    logits = answer_logits(outputs[0]) if len(outputs) == 1 else None
    if logits is None or len(logits[0]) != n_examples:
        return None
    start, end = (side.detach().cpu().double().log_softmax(1) for side in logits)
    best_start = start.cummax(1)  # for each end
    best = (best_start.values + end).max(1)
    return torch.stack([best_start.indices.gather(1, best.indices[:, None])[:, 0].double(), best.values.exp()], 1)


def _probabilities(logits: Tensor) -> Tensor:
    """The probability of each class; rows that already are probabilities, which add up to 1, stay as they are."""
    is_distribution = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    return logits if is_distribution else logits.softmax(1)
