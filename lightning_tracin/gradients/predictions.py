"""What a model says of an example, seen in the forward pass that gives its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.layers import named_layer
from lightning_tracin.gradients.losses import Losses, hugging_face_model


class PredictionProbe:
    """The outputs of the parts of a module that tell what it predicts.

    They are believed in this order: the linear layer that alone feeds the loss, the model of transformers inside the
    module, and the module itself where it returns ``logits`` as such a model does.

    Args:
        module: the module.
        last_layer: name of the linear layer that alone feeds the loss, if it is known.
    """

    def __init__(self, module: nn.Module, last_layer: str | None) -> None:
        self._module = module
        self._name = last_layer
        self._last_layer: nn.Module | None = None
        self._hugging_face: nn.Module | None = None
        self._seen: dict[nn.Module, list[Any]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See what the parts return, as they are called."""
        # found anew each time: a module's setup may have built them again
        self._last_layer = None if self._name is None else named_layer(self._module, self._name)
        self._hugging_face = hugging_face_model(self._module)
        parts = (self._last_layer, self._hugging_face, self._module)
        self._seen = {part: [] for part in parts if part is not None}
        with ExitStack() as hooks:
            for part, seen in self._seen.items():
                hooks.callback(part.register_forward_hook(partial(_see, seen)).remove)
            yield

    def watching(self, losses: Losses) -> Losses:
        """The losses, in whose forward pass the parts are seen; a backward pass may call some again (checkpointing)."""

        def watched(batch: Any) -> Tensor:
            with self.watched():
                return losses(batch)

        return watched

    def predictions(self, n_examples: int, labels: Tensor | None) -> Tensor:
        """What was predicted for each example of the batch that was seen.

        Args:
            n_examples: in the batch.
            labels: of the batch; they tell classification from regression.

        Returns:
            (n_examples, 2) float64: the class and its probability, or a value and NaN; NaN where there is not one
            prediction for each example (tokens, several labels).
        """
        logits = next((found for part in self._seen if (found := self._logits(part, n_examples)) is not None), None)
        unknown = torch.full((n_examples, 2), torch.nan, dtype=torch.float64)
        if logits is None or (labels is not None and labels.dim() > 1 and labels.shape[-1] > 1):
            return unknown
        if logits.shape[1] > 1:
            likeliest = _probabilities(logits).max(1)
            return torch.stack([likeliest.indices.double(), likeliest.values], 1)
        if self._hugging_face is None and labels is not None and not labels.is_floating_point():
            positive = logits[:, 0].sigmoid()
            return torch.stack([(positive > 0.5).double(), torch.maximum(positive, 1 - positive)], 1)
        return torch.stack([logits[:, 0], unknown[:, 1]], 1)

    def _logits(self, part: nn.Module, n_examples: int) -> Tensor | None:
        """(n_examples, number of classes) float64, if a part was called once and returned such."""
        if len(self._seen[part]) != 1:
            return None
        output = self._seen[part][0]
        if part is not self._last_layer:
            output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() not in (1, 2):
            return None
        return output.detach().double().cpu().reshape(n_examples, -1) if len(output) == n_examples else None


def _see(seen: list[Any], _: nn.Module, __: Any, output: Any) -> None:
    seen.append(output)


def _probabilities(logits: Tensor) -> Tensor:
    """The probability of each class; what sums up to 1 already is taken as it is."""
    is_distribution = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    return logits if is_distribution else logits.softmax(1)
