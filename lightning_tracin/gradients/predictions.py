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
from lightning_tracin.gradients.outputs import best_answers, tell_classes


class PredictionProbe:
    """Reads predictions from the outputs of a module's layers.

    The logits come from the first of these that gives one row for each example: the module itself if its output has
    ``logits``, the model of transformers inside the module, and the only linear layer that feeds the loss directly,
    which goes before that model if it stands outside of it. Those of classes are told by their losses, see
    :meth:`choose`.

    Args:
        module: the module.
        last_layer: name of the only linear layer that feeds the loss directly; None if it is not known.

    Attributes:
        chosen: which of these gave the logits of classes, once that is known; see :meth:`choose`.
    """

    def __init__(self, module: nn.Module, last_layer: str | None) -> None:
        self._module = module
        self._name = last_layer
        self._last_layer: nn.Module | None = None
        self._hugging_face: nn.Module | None = None
        self._outputs: dict[nn.Module, list[Any]] = {}
        self.chosen: str | None = None

    @property
    def knows_last_layer(self) -> bool:
        """Whether the linear layer that feeds the loss is known."""
        return self._name is not None

    def look_at(self, last_layer: str) -> None:
        """Observe a layer, of this name, as the only linear one that feeds the loss directly."""
        self._name = last_layer

    @contextmanager
    def watched(self, *, differentiable: bool = False) -> Iterator[None]:
        """Record the outputs of the observed modules while the context lasts.

        Args:
            differentiable: whether to make logits differentiable that no trainable weight comes before.
        """
        # The modules are looked up each time, because a module's setup hook may have rebuilt them.
        self._last_layer = None if self._name is None else named_layer(self._module, self._name)
        self._hugging_face = hugging_face_model(self._module)
        within = self._hugging_face is not None and any(
            each is self._last_layer for each in self._hugging_face.modules()
        )
        inner = (self._hugging_face, self._last_layer) if within else (self._last_layer, self._hugging_face)
        self._outputs = {submodule: [] for submodule in (self._module, *inner) if submodule is not None}
        with ExitStack() as hooks:
            for submodule, outputs in self._outputs.items():
                hooks.callback(submodule.register_forward_hook(partial(_append_output, outputs)).remove)
                if differentiable:
                    hooks.callback(submodule.register_forward_hook(_make_differentiable).remove)
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
        return next((logits for _, logits in self._ranked(n_examples, dims)), None)

    def choose(self, losses: Tensor, labels: Tensor) -> bool | None:
        """Find out which of the logits that were seen are those of the classes; from now on only these count.

        Args:
            losses: (B,) of the pass that was observed, with their graph.
            labels: (B,) float64, the classes that they are the losses of; NaN and negative ones are none.

        Returns:
            Whether any are; None if that cannot be told, as where no label has a gradient.
        """
        ranked = [each for each in self._ranked(len(losses), (2,)) if each[1].requires_grad]
        if not ranked or not losses.requires_grad:
            return None
        with torch.enable_grad():
            total = losses.sum()
        gradients = torch.autograd.grad(total, [logits for _, logits in ranked], retain_graph=True, allow_unused=True)
        told: list[bool | None] = []
        for (name, logits), gradient in zip(ranked, gradients, strict=True):
            if gradient is not None:
                told.append(tell_classes(logits.detach().cpu().float(), gradient.cpu().float(), labels))
                if told[-1]:
                    self.chosen = name
                    return True
        return None if all(each is None for each in told) else False

    def _ranked(self, n_examples: int, dims: Sequence[int]) -> list[tuple[str, Tensor]]:
        """The logits that were seen, the likeliest first, each with the name of what gave it."""
        seen = [(self._name_of(submodule), self._logits(submodule, n_examples)) for submodule in self._outputs]
        found = [
            (name, logits)
            for name, logits in seen
            if logits is not None and logits.dim() in dims and self.chosen in (None, name)
        ]
        return sorted(found, key=lambda each: each[1].dim() > 2)

    def _name_of(self, submodule: nn.Module) -> str:
        if submodule is self._last_layer:
            return "layer"
        return "module" if submodule is self._module else "model"

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


def _make_differentiable(_: nn.Module, __: Any, output: Any) -> None:
    logits = output if isinstance(output, Tensor) else output_entry(output, "logits")
    if isinstance(logits, Tensor) and logits.is_floating_point() and not logits.requires_grad:
        logits.requires_grad_()


def _append_output(outputs: list[Any], _: nn.Module, __: Any, output: Any) -> None:
    outputs.append(output)


def _probabilities(logits: Tensor) -> Tensor:
    """The probability of each class; rows that already are probabilities, which add up to 1, stay as they are."""
    is_distribution = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    return logits if is_distribution else logits.softmax(1)
