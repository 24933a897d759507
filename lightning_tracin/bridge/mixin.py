"""What a LightningModule says about itself: its losses, its layers, its words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.gradients.batches import shallow_copy, shown_labels_of, tensors_of
from lightning_tracin.gradients.layers import find_embedding_layer, find_last_layer, only_layer_before_loss
from lightning_tracin.gradients.losses import Losses, hugging_face_losses, make_earlier
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.printable import storable
from lightning_tracin.gradients.relabelled import relabelled
from lightning_tracin.parallel.fsdp import call_in_forward_pass, unwrapped


class TracInMixin:
    """Tells influence methods about a LightningModule; stands before ``LightningModule`` in the bases.

    Every method has a default that serves Hugging Face models; override what differs.

    Example::

        class Classifier(TracInMixin, pl.LightningModule):
            def influence_loss(self, batch):
                ids, labels = batch
                return F.cross_entropy(self(ids), labels, reduction="none")
    """

    def influence_loss(self, batch: Any) -> Tensor:
        """One unreduced loss for each example of the batch.

        The default serves a ``forward`` that returns a Hugging Face output with ``logits``, and a batch with
        ``labels``: classification, multi-label classification, multiple choice, regression, token classification,
        causal and masked language models; or with ``start_positions`` and ``end_positions``: question answering. An
        example with several labels has their mean as its loss.

        Args:
            batch: what ``training_step`` takes.

        Returns:
            Float tensor of shape (B,).

        Raises:
            ValueError: if the default cannot tell the losses.
        """
        return hugging_face_losses(self, batch)  # type: ignore[arg-type]

    def influence_embedding_layer(self) -> nn.Module:
        """The word embedding layer, called with token ids (B, T) and returning (B, T, H); or an ``nn.EmbeddingBag``.

        The default is a Hugging Face model's, or else the only embedding layer. Before the default is used, a forward
        pass tells of several the one that is called with the batch's token ids.

        Raises:
            ValueError: if there is none, or several candidates; the message lists them by name.
        """
        return find_embedding_layer(self)  # type: ignore[arg-type]

    def influence_last_layer(self) -> nn.Module:
        """The last linear layer.

        The default is a Hugging Face language model's output embedding, else the ``nn.Linear`` that is registered
        last. Before the default is used, a forward pass checks that this layer alone feeds the loss; if another one
        does, that one is used, and if several do, an error lists them.

        Raises:
            ValueError: if there is none.
        """
        return find_last_layer(self)  # type: ignore[arg-type]

    def influence_words(self, batch: Any) -> list[list[str]]:
        """What to print for each token id of the batch: B lists of T strings.

        The default asks ``tokenizer``, an attribute of the module or its datamodule, for the tokens of the batch's
        ids; without one, the ids themselves are printed.

        Args:
            batch: what ``training_step`` takes.
        """
        ids = token_ids_of(batch)
        return [] if ids is None else [words_of_ids(self, row) for row in ids.tolist()]

    def influence_labels(self, batch: Any) -> Tensor | None:
        """The labels to show beside the batch's examples; scores do not depend on them.

        The default takes ``labels`` or ``label`` of a mapping, or the second of two entries, of which either may be
        such a mapping; of questions, where the answer starts (``start_positions``). Of a batch in another form none are
        shown.

        Args:
            batch: what ``training_step`` takes.

        Returns:
            A tensor whose first dimension counts the examples, or None. One label for each, (B,) or (B, 1), is shown;
            whether all of them are 0 and 1 tells if a single output is that of two classes or a value.
        """
        return shown_labels_of(batch)

    def influence_with_labels(self, batch: Any, labels: Tensor) -> Any:
        """The batch with other labels in the place of its own, also where it has none: what other targets are made of.

        The default puts them where ``influence_labels`` looks for them by default, and says where it cannot. Override
        it where a batch has another form::

            def influence_with_labels(self, batch, labels):
                ids, _, lengths = batch
                return ids, labels, lengths

        Args:
            batch: what ``training_step`` takes, or the same without labels.
            labels: as ``influence_loss`` expects them: (B,) classes, (B, C) sets of classes, (B, T) classes or tokens
                by position, -100 where there is no loss; of questions, (B, 2) where the answers start and end.

        Returns:
            A batch that ``influence_loss`` takes. The one that is given stays as it is.

        Raises:
            ValueError: if the form of the batch does not tell where labels belong.
        """
        return relabelled(self, batch, labels)  # type: ignore[arg-type]

    def influence_label_names(self) -> dict[int, str]:
        """What to print for each label, by its number: ``{0: "ham", 1: "spam"}``, or ``dict(enumerate(names))``.

        The default is ``id2label`` of a Hugging Face configuration; without one, and for a regression, the numbers are
        printed.
        """
        return _configured_label_names(self)  # type: ignore[arg-type]


def says_its_loss(module: nn.Module) -> bool:
    """Whether an example's loss is what a module says itself, by ``influence_loss`` or ``training_step``."""
    return getattr(type(module), "influence_loss", None) is not TracInMixin.influence_loss


def losses_of(module: nn.Module) -> Losses:
    """The module's losses of single examples; without the mixin, a :class:`MeanLoss` that is yet to be checked.

    They raise ValueError where ``influence_loss`` needs an attribute that the module has not yet.
    """
    own = getattr(module, "influence_loss", None)
    if not callable(own):
        return MeanLoss(module, labels_of=partial(labels_of_module, module))

    def losses(batch: Any) -> Tensor:
        try:
            found: Tensor = call_in_forward_pass(module, own, shallow_copy(batch))
        except AttributeError as error:
            advice = make_earlier(module, error)
            if not advice:
                raise
            raise ValueError(f"influence_loss of {type(module).__name__} failed: {error}. {advice}".rstrip()) from error
        return found

    return losses


def embedding_layer_of(module: nn.Module, losses: Callable[[], Tensor], batch: Any) -> nn.Module:
    """The word embedding layer that the module names, or the one that is found in a forward pass on a batch."""
    own = getattr(module, "influence_embedding_layer", None)
    if callable(own) and getattr(own, "__func__", None) is not TracInMixin.influence_embedding_layer:
        layer = own()
    else:
        layer = find_embedding_layer(module, losses, _all_token_ids(batch))
    return _checked(layer, nn.Module, "influence_embedding_layer")


def last_layer_of(module: nn.Module, losses: Callable[[], Tensor]) -> nn.Module:
    """The last layer that the module names, or the one linear layer that feeds the loss in a forward pass."""
    own = getattr(type(module), "influence_last_layer", None)
    if own is None or own is TracInMixin.influence_last_layer:
        return only_layer_before_loss(module, losses)
    return _checked(module.influence_last_layer(), nn.Linear, "influence_last_layer")  # type: ignore[operator]


def words_of_batch(module: nn.Module, batch: Any, token_ids: list[int]) -> dict[int, str]:
    """What to print for the given token ids, by id.

    Args:
        module: says it by ``influence_words`` if it overrides that, else by its tokenizer.
        batch: the batch that the ids come from.
        token_ids: the ids, each once.

    Raises:
        ValueError: if ``influence_words`` does not return a string for each id of the batch.
    """
    if not has_own_words(module):
        return {token: storable(word) for token, word in zip(token_ids, words_of_ids(module, token_ids), strict=True)}
    rows = module.influence_words(batch)  # type: ignore[operator]
    ids = token_ids_of(batch)
    if ids is None or [len(row) for row in rows] != [ids.shape[1]] * len(ids):
        raise ValueError(
            "influence_words must return B lists of T strings, one for each token id of the batch, shape "
            f"{None if ids is None else tuple(ids.shape)}, but returned lists of {[len(row) for row in rows]}."
        )
    named = {
        token: storable(str(word))
        for row, words in zip(ids.tolist(), rows, strict=True)
        for token, word in zip(row, words, strict=True)
    }
    return {token: named.get(token, str(token)) for token in token_ids}


def has_own_words(module: nn.Module) -> bool:
    """Whether a module says by a method of its own what to print for token ids."""
    return getattr(type(module), "influence_words", None) not in (None, TracInMixin.influence_words)


def words_of_ids(module: Any, token_ids: list[int]) -> list[str]:
    """The tokenizer's tokens for the ids, or the ids as text where there is no tokenizer."""
    tokenizer = tokenizer_of(module)
    if tokenizer is None:
        return [str(token) for token in token_ids]
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    return [str(token) if word is None else word for token, word in zip(token_ids, tokens, strict=True)]


def labels_of_module(module: nn.Module, batch: Any, n_examples: int | None = None) -> Tensor | None:
    """The labels to show beside a batch's examples: those that the module tells, or that the batch's form does.

    Args:
        module: says it by ``influence_labels`` if it overrides that, or has it without the mixin.
        batch: what ``training_step`` takes.
        n_examples: number of examples in the batch; None where it is not known, and not checked.

    Raises:
        ValueError: if ``influence_labels`` returns neither None nor a tensor that counts the examples first.
    """
    own = getattr(module, "influence_labels", None)
    if not callable(own) or getattr(own, "__func__", None) is TracInMixin.influence_labels:
        return shown_labels_of(batch)
    labels = own(shallow_copy(batch))
    if labels is None or (isinstance(labels, Tensor) and labels.dim() > 0 and n_examples in (len(labels), None)):
        return labels
    got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise ValueError(
        f"influence_labels must return None, or a tensor with a label for each of the batch's {n_examples} examples, "
        f"but returned {got}."
    )


def with_labels_of(module: nn.Module, batch: Any, labels: Tensor) -> Any:
    """The batch with other labels in the place of its own, as the module puts them there, or as its form tells.

    Args:
        module: does it by ``influence_with_labels``, with or without the mixin.
        batch: what ``training_step`` takes, or the same without labels.
        labels: those to put there.

    Raises:
        ValueError: if the form of the batch does not tell where labels belong, or if the module returns no batch.
    """
    own = getattr(module, "influence_with_labels", None)
    if not callable(own):
        return relabelled(module, batch, labels)
    changed = own(shallow_copy(batch), labels)
    if changed is None:
        raise ValueError(
            "influence_with_labels must return the batch with other labels in the place of its own, but returned None."
        )
    return changed


def label_names_of(module: nn.Module) -> dict[int, str]:
    """What to print for each label that the module, or a Hugging Face configuration in it, names.

    Raises:
        ValueError: if ``influence_label_names`` does not return names by number.
    """
    own = getattr(module, "influence_label_names", None)
    names = own() if callable(own) else _configured_label_names(module)
    if not isinstance(names, Mapping) or not all(isinstance(number, int) for number in names):
        raise ValueError(
            "influence_label_names must return a mapping from each label's number to its name, such as "
            f"{{0: 'ham', 1: 'spam'}}, but returned {names!r}."
        )
    return {number: storable(str(name)) for number, name in names.items()}


def tokenizer_of(module: Any) -> Any:
    """The tokenizer that is an attribute of the module or of its datamodule; None without one."""
    try:
        datamodule = module.trainer.datamodule
    except (RuntimeError, AttributeError):  # how Lightning says that the module has no trainer, or no datamodule
        datamodule = None
    for owner in (module, datamodule):
        tokenizer = getattr(owner, "tokenizer", None)
        if hasattr(tokenizer, "convert_ids_to_tokens"):
            return tokenizer
    return None


def _configured_label_names(module: nn.Module) -> dict[int, str]:
    """The names of a Hugging Face classifier's labels; none of a regression, whose labels are numbers."""
    for part in module.modules():
        config = getattr(part, "config", None)
        names = getattr(config, "id2label", None)
        if isinstance(names, dict):
            is_regression = len(names) == 1 or getattr(config, "problem_type", None) == "regression"
            return {} if is_regression else {int(number): str(name) for number, name in names.items()}
    return {}


def token_ids_of(batch: Any) -> Tensor | None:
    """The batch's token ids (B, T): by name in a mapping, else its first tensor of whole numbers in two dimensions.

    Several texts of an example, (B, C, T), are put in a row.
    """
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        ids: Tensor = batch["input_ids"]
        return ids.flatten(1) if ids.dim() > 2 else ids
    return next((t for t in tensors_of(batch) if t.dim() == 2 and not t.is_floating_point()), None)


def _all_token_ids(batch: Any) -> list[Tensor]:
    """All that may be token ids (B, T): those that are named so, else whole numbers that are not named otherwise."""
    if isinstance(batch, Mapping):
        named = [name for name in batch if "input_ids" in str(name)]
        others = [name for name in batch if not re.search("position|type|segment|mask|label|length", str(name))]
        batch = [batch[name] for name in named or others]
    tensors = tensors_of(batch)
    return [each for each in tensors if each.dim() > 1 and each.dtype in (torch.int64, torch.int32)]


def _checked(layer: Any, kind: type[nn.Module], method: str) -> nn.Module:
    layer = unwrapped(layer) if isinstance(layer, nn.Module) else layer
    if not isinstance(layer, kind):
        raise ValueError(f"{method} must return an nn.{kind.__name__}, but returned {type(layer).__name__}.")
    return layer
