"""Hugging Face models in the place of LightningModules: wrapped with the mixin, whose defaults serve them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import nn

from lightning_tracin.bridge.compat import lightning_of
from lightning_tracin.bridge.mixin import TracInMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Classes of transformers and of peft, by name: to import them takes seconds, and a model of theirs has done so.
_MODELS = ("PreTrainedModel", "PeftModel")


def is_hugging_face(model: object) -> bool:
    """Whether something is a model of transformers, or of peft, and not a module around one."""
    return any(kind.__name__ in _MODELS for kind in type(model).__mro__)


def wrapped_model(model: PreTrainedModel, trainer: Any, *loaders: Any) -> pl.LightningModule:
    """A LightningModule around a Hugging Face model, for influence alone.

    Its weights are called ``model.`` and what they are called in the model, as in a LightningModule that keeps it as
    ``self.model``. Words are named by the model's attribute ``tokenizer``, if it has been given one, or by the
    tokenizer that a loader's collate function holds, such as ``DataCollatorWithPadding`` or ``tokenizer.pad``.

    Args:
        model: the model.
        trainer: of which of Lightning's two packages the module is to be.
        loaders: of the examples.
    """
    package: Any = lightning_of(trainer)

    class HuggingFaceModule(TracInMixin, package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module = model
            tokenizers = (model, *(getattr(loader, "collate_fn", None) for loader in loaders))
            found = (tokenizer for each in tokenizers if (tokenizer := _tokenizer_in(each)) is not None)
            self.tokenizer = next(found, None)

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

    HuggingFaceModule.__name__ = type(model).__name__  # which messages name
    return HuggingFaceModule()


def _tokenizer_in(holder: Any) -> Any:
    """The tokenizer that a model, a collate function or a ``functools.partial`` of one holds; None without one."""
    holder = getattr(holder, "func", holder)
    for each in (*(getattr(holder, name, None) for name in ("tokenizer", "processing_class", "__self__")), holder):
        if hasattr(each, "convert_ids_to_tokens"):
            return each
    return None
