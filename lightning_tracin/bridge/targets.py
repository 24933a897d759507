"""The losses of test examples' targets, which take the place of the module's own losses.

A class is explained by the loss that an example would have if the class were its label, so a module that says its own
loss serves all classes. What is no label, a value or one class of a set, is taken from the logits of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tracin.bridge.fingerprint import hash_of
from lightning_tracin.bridge.mixin import token_ids_of, with_labels_of
from lightning_tracin.bridge.observing import Observer, lacks_labels
from lightning_tracin.bridge.target_checks import require_fitting, require_labels_are_read, require_told
from lightning_tracin.bridge.target_names import TargetNames
from lightning_tracin.gradients.attention_masks import attended_tokens
from lightning_tracin.gradients.batches import IGNORED, tensors_of
from lightning_tracin.gradients.losses import Losses, hugging_face_model, writes_apart
from lightning_tracin.gradients.mean_loss import MeanLoss
from lightning_tracin.gradients.outputs import Output, counted_tokens, named_tokens
from lightning_tracin.gradients.predictions import PredictionProbe
from lightning_tracin.gradients.targets import Target

_ANOTHER_ORDER = (
    "The test loader gave other examples at each pass. Use a sampler that yields the same examples each time; their "
    "order does not matter, unless the data set is a stream."
)


class OtherExamples(ValueError):
    """A test example is not what it was when the model said something of it."""


class TargetLosses:
    """What is explained of some test examples, at each checkpoint, as losses, of which a pair has two.

    Args:
        module: the module, which is given each checkpoint's weights in turn.
        target: what was asked for.
        probe: sees what the module says.
        training_labels: see :class:`~lightning_tracin.bridge.observing.Observer`.
    """

    def __init__(
        self, module: nn.Module, target: Target, probe: PredictionProbe, training_labels: Callable[[], Tensor]
    ) -> None:
        self.target = target
        self._module = module
        self._probe = probe
        self._observer = Observer(module, probe, training_labels)
        self._output: Output | None = None
        self._names: TargetNames | None = None
        self._classes: tuple[int, ...] = ()
        self._said: dict[int, Tensor] = {}
        self._said_names: dict[int, str] = {}
        self._said_of: dict[int, bytes] = {}

    @property
    def classes(self) -> tuple[int, ...]:
        """The class that is explained of every example, or a pair; none of a target that names none, or tokens."""
        return () if self.target.has_positions else self._classes

    def of(self, batch: Any, numbers: Sequence[int] | None) -> list[Losses]:
        """The losses of a batch's examples; of a pair, those of the first class and those that are taken from them.

        Args:
            batch: the module's, perhaps without labels.
            numbers: of its examples; None for a batch that only fills up.

        Raises:
            ValueError: if the target does not fit what the module says, or a position has no token.
        """
        if self.target.is_plain:
            self._observer.warn_if_untold(batch)
            return [self._probe.watching(self._observer.losses)]
        output, _ = self._learned(batch)
        if output.kind == "value" or (output.kind == "set" and self._classes):
            return [partial(self._losses_of_outputs, classes=self._classes or (0,))]
        of_each = [self._labels(batch, numbers, number) for number in self._classes or (None,)]
        if isinstance(self._observer.losses, MeanLoss):
            self._observer.losses.check_new(with_labels_of(self._module, batch, of_each[0]))
        return [self._probe.watching(partial(self._losses_of_labels, labels=labels)) for labels in of_each]

    def checked_batch(self, batch: Any) -> Any:
        """The batch as the module's own losses take it, with labels."""
        if self.target.is_plain:
            return batch
        output, _ = self._learned(batch)
        if output.kind == "value" and self._observer.takes(batch):
            return batch
        return with_labels_of(self._module, batch, self._all(batch, 0))

    def see(self, batch: Any, numbers: Sequence[int] | None) -> Tensor:
        """Remember what the model says of a batch's examples, at the weights that it has.

        Args:
            batch: the module's, perhaps without labels.
            numbers: of its examples; None for a batch that only fills up.

        Returns:
            What it says, the examples first.
        """
        kind, names = self._learned(batch)[0].kind, self._names
        assert names is not None
        with torch.no_grad():
            output = replace(self._observer.output(batch), causal=self._output is not None and self._output.causal)
        said = output.logits.detach().cpu() if kind == "value" else output.said()
        said = said.reshape(len(said), -1)
        counted = self._counted(batch) if kind == "tokens" else torch.ones_like(said, dtype=torch.bool)
        chosen = self._chosen(batch, numbers or (), counted)
        hashes = self._hashes(batch, counted) if kind == "tokens" else []
        for row, number in enumerate(numbers or ()):
            self._said[number] = said[row][counted[row]]
            if hashes:
                self._said_of[number] = hashes[row]
            self._said_names[number] = names.of(said[row][chosen[row]].tolist(), batch, row)
        return said

    def predictions(self, batch: Any, labels: Tensor | None, losses: Tensor) -> Tensor:
        """The predictions of a batch that the probe has just seen, see :meth:`PredictionProbe.predictions`.

        Args:
            batch: the module's, perhaps without labels.
            labels: its own, if it has any.
            losses: (B,) of its examples' targets.
        """
        if self._output is None:
            return self._observer.predictions(labels, losses)
        if not self._output.is_told:
            return torch.full((len(losses), 2), torch.nan, dtype=torch.float64)
        if labels is None and self._output.kind in ("set", "value") and self._output.n_classes > 1:
            labels = self._all(batch, 0)
        return self._probe.predictions(len(losses), labels, is_binary=self._output.kind == "binary")

    def known(self, labels: Tensor | None) -> Tensor | None:
        """A batch's labels, NaN for an example that has none, as far as its classes tell."""
        kind = None if self._output is None else self._output.kind
        if labels is None or kind not in ("binary", "class") or not lacks_labels(labels):
            return labels
        values = labels.detach().cpu().double()
        return values.masked_fill(values < 0, torch.nan)

    def name_of(self, number: int) -> str:
        """What to print for the target of a test example."""
        if self._classes and self._names is not None:
            return ", not ".join(map(self._names.label, self._classes))
        return self._said_names.get(number, "")

    def _learned(self, batch: Any) -> tuple[Output, TargetNames]:
        """What the module says, by the first batch, on which the target is checked."""
        if self._output is None or self._names is None:
            with torch.no_grad():
                output = self._observer.output(batch)
                names = TargetNames(self._module, output)
                self._classes = tuple(names.number(each) for each in self.target.classes)
                require_fitting(self.target, self._classes, output, names)
                self._output, self._names = output.without_examples, names
                if output.kind != "value":
                    labels = self._all(batch, 0), self._all(batch, 1)
                    self._output = require_labels_are_read(self._observer, self._output, batch, labels)
                require_told(self.target, self._classes, self._output, self._observer)
        return self._output, self._names

    def _labels(self, batch: Any, numbers: Sequence[int] | None, number: int | None) -> Tensor:
        """The labels of a batch's targets: a class, or without one what the model said, or the batch's own."""
        output, own = self._learned(batch)[0], self._observer.labels(batch)
        if output.kind == "tokens":
            return self._labels_of_tokens(batch, numbers, number, own)
        if number is not None or numbers is None:
            return self._all(batch, number or 0)
        said = torch.stack([self._what_was_said(each) for each in numbers])
        like = self._all(batch, 0)
        return said.reshape(like.shape).to(like)

    def _labels_of_tokens(
        self, batch: Any, numbers: Sequence[int] | None, number: int | None, own: Tensor | None
    ) -> Tensor:
        """(B, T) the labels of tokens, -100 at those that do not count."""
        counted = self._counted(batch)
        labels = self._all(batch, number or 0) if own is None or number is not None else own.clone()
        if self.target.what == "prediction" and numbers is not None:
            said = torch.cat([self._what_was_said(each) for each in numbers])
            for each, found in zip(numbers, self._hashes(batch, counted), strict=True):
                if self._said_of[each] != found:
                    raise OtherExamples(
                        f"Test example {each} has other tokens, or labels at other places, than when the model said "
                        'what target="prediction" explains'
                    )
            labels[counted.to(labels.device)] = said.to(labels)
        if numbers is not None:
            counted = self._chosen(batch, numbers, counted)
        if self.target.what == "label" and self._names is not None:
            for row, each in enumerate(numbers or ()):
                self._said_names[each] = self._names.of(labels[row].cpu()[counted[row]].tolist(), batch, row)
        return labels.masked_fill(~counted.to(labels.device), IGNORED)

    def _what_was_said(self, number: int) -> Tensor:
        if number not in self._said:
            raise ValueError(_ANOTHER_ORDER)
        return self._said[number]

    def _hashes(self, batch: Any, counted: Tensor) -> list[bytes]:
        """What each example of a batch reads, and where it has labels, however much it is padded."""
        ids = token_ids_of(batch)
        if ids is None or ids.shape != counted.shape:  # what is read is not what is labelled
            return [hash_of(row.nonzero()) for row in counted]
        first = attended_tokens(batch, ids.shape).long().argmax(1).tolist()
        found = zip(ids.cpu(), counted, first, strict=True)
        # behind the last label may be padding that no mask tells
        return [hash_of([(row.nonzero() - start), of[start:][: _last(row) + 1 - start]]) for of, row, start in found]

    def _counted(self, batch: Any) -> Tensor:
        """(B, T) the tokens that have a label."""
        assert self._output is not None
        labels = self._observer.labels(batch)
        return counted_tokens(labels, batch, self._shape_of_tokens(batch), causal=self._output.causal)

    def _chosen(self, batch: Any, numbers: Sequence[int], counted: Tensor) -> Tensor:
        """(B, T) those of the counted tokens that the target's positions name."""
        if not self.target.has_positions or not numbers:
            return counted
        positions = [self.target.positions_at(number) for number in numbers]
        read = None if writes_apart(hugging_face_model(self._module)) else batch  # padded in another way than labels
        named = named_tokens(positions, read, tuple(counted.shape))
        for number, places, reached in zip(numbers, positions, (counted & named).any(1).tolist(), strict=True):
            if not reached:
                raise ValueError(
                    f"positions {list(places or ())} name no token of test example {number} that counts. They count "
                    "from its first token, padding left out; tokens without a label (-100) do not count, nor does the "
                    "first one of a text whose next tokens are predicted."
                )
        return counted & named

    def _shape_of_tokens(self, batch: Any) -> tuple[int, ...]:
        """(B, T) of the batch's labels, or of its token ids."""
        labels = self._observer.labels(batch)
        like = token_ids_of(batch) if labels is None else labels
        if like is None:
            raise ValueError(f"target={str(self.target)!r}: this batch holds no token ids of shape (B, T).")
        return tuple(like.shape)

    def _all(self, batch: Any, number: int) -> Tensor:
        """Labels by which all that counts in a batch is of one class; of sets, all classes in (1) or out (0)."""
        assert self._output is not None
        kind, labels, logits = self._output.kind, self._observer.labels(batch), self._output.logits
        device = tensors_of(batch)[0].device
        if kind == "answer":
            n_examples = len(labels) if labels is not None else len(tensors_of(batch)[0])
            return torch.full((n_examples, 2), number, dtype=torch.long, device=device)
        if kind == "tokens":
            like = labels if labels is not None else torch.zeros(self._shape_of_tokens(batch), dtype=torch.long)
            filled = torch.full_like(like, number).to(device)
            return filled.masked_fill(~self._counted(batch).to(device), IGNORED)
        if labels is None and logits.shape[1] > 1 and kind in ("set", "value"):
            shape = (len(tensors_of(batch)[0]), logits.shape[1])
            return torch.full(shape, number, dtype=torch.float32, device=device)
        return self._observer.labels_of(batch, number)

    def _losses_of_labels(self, batch: Any, labels: Tensor) -> Tensor:
        return self._observer.losses(with_labels_of(self._module, batch, labels))

    def _losses_of_outputs(self, batch: Any, classes: Sequence[int]) -> Tensor:
        """(B,) minus the first output, or minus its log probability; plus that of the second."""
        output = self._observer.output(batch)
        first, *second = (output.log_of_output(number) for number in classes)
        return second[0] - first if second else -first


def _last(counted: Tensor) -> int:
    """The place of the last token that counts; -1 if none does."""
    return max(counted.nonzero()[:, 0].tolist(), default=-1)
