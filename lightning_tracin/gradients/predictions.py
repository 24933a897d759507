"""A model's predictions, observed by hooks in the forward pass that computes the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.layers import named_layer
from lightning_tracin.gradients.losses import Losses, answer_logits, hugging_face_model, output_entry
from lightning_tracin.gradients.outputs import best_answers


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

    @property
    def knows_last_layer(self) -> bool:
        """Whether the linear layer that feeds the loss is known."""
        return self._name is not None

    def look_at(self, last_layer: str) -> None:
        """Observe a layer, of this name, as the only linear one that feeds the loss directly."""
        self._name = last_layer

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

    def predictions(self, n_examples: int, labels: Tensor | None, *, is_binary: bool) -> Tensor:
        """The prediction for each example of the batch that was observed.

        Args:
            n_examples: number of examples in the batch.
            labels: the batch's labels, of which several for each example mean as many outputs; None if unknown.
            is_binary: whether a single output stands for two classes, see
                :func:`~lightning_tracin.gradients.outputs.output_of`; else it is a value.

        Returns:
            (n_examples, 2) float64: the class and its probability, or a regression's value and NaN; of a question,
            where the likeliest answer starts, and that answer's probability. All are NaN if there is not exactly one
            prediction for each example (token classification, several labels).
        """
        answers = self.answer_logits(n_examples)
        if answers is not None:
            start, _, log_probability = best_answers(*answers.detach().cpu().double().unbind(1))
            return torch.stack([start.double(), log_probability.exp()], 1)
        found = self.logits(n_examples, (1, 2))
        logits = None if found is None else found.detach().cpu().double().reshape(n_examples, -1)
        unknown = torch.full((n_examples, 2), torch.nan, dtype=torch.float64)
        if logits is None or (labels is not None and labels.dim() > 1 and labels.shape[-1] > 1):
            return unknown
        if logits.shape[1] > 1:
            most_likely = _probabilities(logits).max(1)
            return torch.stack([most_likely.indices.double(), most_likely.values], 1)
        if is_binary:
            positive = logits[:, 0].sigmoid()
            return torch.stack([(positive > 0.5).double(), torch.maximum(positive, 1 - positive)], 1)
        return torch.stack([logits[:, 0], unknown[:, 1]], 1)

    def logits(self, n_examples: int, dims: Sequence[int] = (1, 2, 3)) -> Tensor | None:
        """The logits that were seen, with their graph; None if none have one row for each example.

        Args:
            n_examples: number of examples in the batch.
            dims: their possible numbers of dimensions; those of one prediction for each example, 1 or 2, come first.
        """
        seen = [logits for submodule in self._outputs if (logits := self._logits(submodule, n_examples)) is not None]
        ranked = sorted(seen, key=lambda logits: logits.dim() > 2)
        return next((logits for logits in ranked if logits.dim() in dims), None)

    def answer_logits(self, n_examples: int) -> Tensor | None:
        """(n_examples, 2, T) the logits of where answers start and end, with their graph; None if there are none."""
        for outputs in self._outputs.values():
            found = answer_logits(outputs[0]) if len(outputs) == 1 else None
            if found is not None and len(found[0]) == n_examples:
                return torch.stack(found, 1)
        return None

    @property
    def from_hugging_face(self) -> bool:
        """Whether the model of transformers inside the module gave logits."""
        outputs = [] if self._hugging_face is None else self._outputs[self._hugging_face]
        return any(isinstance(output_entry(output, "logits"), Tensor) for output in outputs)

    def _logits(self, submodule: nn.Module, n_examples: int) -> Tensor | None:
        """One row for each example; None if a module was not called exactly once, or has another output."""
        if len(self._outputs[submodule]) != 1:
            return None
        output = self._outputs[submodule][0]
        if submodule is not self._last_layer:
            output = output_entry(output, "logits")
        is_floating = isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0
        return output if is_floating and len(output) == n_examples else None


def _append_output(outputs: list[Any], _: nn.Module, __: Any, output: Any) -> None:
    outputs.append(output)


def _probabilities(logits: Tensor) -> Tensor:
    """The probability of each class; rows that already are probabilities, which add up to 1, stay as they are."""
    is_distribution = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    return logits if is_distribution else logits.softmax(1)
