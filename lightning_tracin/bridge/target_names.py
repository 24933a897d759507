"""The names of classes, of tokens and of answers that a target may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_tracin.bridge.mixin import label_names_of, token_ids_of, tokenizer_of, words_of_ids
from lightning_tracin.gradients.losses import hugging_face_model, writes_tokens
from lightning_tracin.gradients.outputs import Output
from lightning_tracin.gradients.printable import storable
from lightning_tracin.gradients.targets import Class, Target, number_of_class

_LISTED = 12  # So many tags or tokens are named.


def require_known(target: Target, module: nn.Module) -> None:
    """Check, before anything is computed, that a target's classes are the module's, as far as their names tell.

    Raises:
        ValueError: if they are not.
    """
    names = label_names_of(module) if target.classes else {}
    if not writes_tokens(hugging_face_model(module)):
        for each in target.classes:
            number_of_class(each, names)


class TargetNames:
    """Knows what to print for what a model says, and which class a name means.

    Args:
        module: has names of labels, or a tokenizer.
        output: what it says of a batch.
    """

    def __init__(self, module: nn.Module, output: Output) -> None:
        self._module = module
        self._kind = output.kind
        self._labels = label_names_of(module)
        #: Whether the classes are the tokens of a vocabulary.
        self.of_vocabulary = output.kind == "tokens" and writes_tokens(hugging_face_model(module))

    def number(self, given: Class) -> int:
        """The number of a class or of a token.

        Raises:
            ValueError: if nothing has this name.
        """
        if not self.of_vocabulary or isinstance(given, int):
            return number_of_class(given, self._labels)
        tokenizer = tokenizer_of(self._module)
        if not callable(getattr(tokenizer, "encode", None)):
            return number_of_class(given, {})
        ids = tokenizer.encode(given, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(
                f"The target {given!r} is no single token: the tokenizer makes {tokenizer.convert_ids_to_tokens(ids)} "
                "of it. Name one token, with the space before it if it begins a word."
            )
        return int(ids[0])

    def of(self, said: Sequence[float], batch: Any, row: int) -> str:
        """What to print for what is explained of an example.

        Args:
            said: its class, value, tags or tokens; a set of classes as zeros and ones; where an answer starts and ends.
            batch: which the example comes from.
            row: its place in the batch.
        """
        if self._kind == "value":
            return f"{said[0]:.3g}"
        numbers = [int(each) for each in said]
        if self._kind == "set":
            numbers = [number for number, is_in in enumerate(numbers) if is_in]
            return ", ".join(map(self.label, numbers)) or "no class"
        if self._kind == "answer":
            ids: Tensor | None = token_ids_of(batch)
            return "" if ids is None else self._text(ids[row, numbers[0] : numbers[1] + 1].tolist())
        if self.of_vocabulary:
            return self._text(numbers)
        return ", ".join(map(self.label, numbers[:_LISTED])) + (", …" if len(numbers) > _LISTED else "")

    def label(self, number: int) -> str:
        """What to print for a class."""
        return self._text([number]) if self.of_vocabulary else self._labels.get(number, str(number))

    def _text(self, ids: list[int]) -> str:
        """What tokens say."""
        tokens = words_of_ids(self._module, ids[:_LISTED])
        joined = getattr(tokenizer_of(self._module), "convert_tokens_to_string", " ".join)(tokens)
        return storable(str(joined)).strip() + (" …" if len(ids) > _LISTED else "")
