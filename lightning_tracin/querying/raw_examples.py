"""Texts, rows and data sets as test examples: tokenised as training's, and put into batches by training's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_tracin.bridge.fingerprint import hash_of, seeded
from lightning_tracin.bridge.loaders import items_of
from lightning_tracin.bridge.unmoved import random_state_kept, unmoved
from lightning_tracin.gradients.batches import described_batch
from lightning_tracin.querying.example_forms import (
    IDS,
    LABELS,
    are_own_labels,
    described,
    has_label,
    is_alike,
    lent,
    own_labels,
    text_columns,
    text_of,
    typed,
)
from lightning_tracin.results.reader import RawText

BY_HAND = (
    "Put them into batches as training does, and pass the loader: "
    "trainer.influence(DataLoader(data, batch_size=8, collate_fn=...))."
)

_BATCH_SIZE = 32  # where training's is not known

_LOOKED_AT = 8  # training examples


@dataclass(frozen=True)
class Collation:
    """How batches are made of examples.

    Attributes:
        collate: makes one.
        batch_size: of how many examples.
        items: a few training examples as they are given to that function; none where no training loader is known.
    """

    collate: Callable[[Any], Any]
    batch_size: int = _BATCH_SIZE
    items: tuple[Any, ...] = ()

    @classmethod
    def of_loader(cls, loader: DataLoader[Any]) -> Collation | None:
        """That of a training loader; None where its data set hands out whole batches."""
        if loader.batch_size is None and loader.batch_sampler is None:
            return None
        with unmoved(loader), random_state_kept():
            if isinstance(loader.dataset, IterableDataset):
                items = tuple(islice(loader.dataset, _LOOKED_AT))
            else:
                n_examples = len(loader.dataset)  # type: ignore[arg-type]
                few = range(0, n_examples, max(1, n_examples // _LOOKED_AT))[:_LOOKED_AT]
                items = tuple(items_of(loader, few, _itself, _nothing))
        return cls(loader.collate_fn, loader.batch_size or _BATCH_SIZE, items)

    @property
    def item(self) -> Any:
        """The first of the training examples; None where none is known."""
        return self.items[0] if self.items else None

    @property
    def n_padded(self) -> int | None:
        """The number of tokens that training's examples are padded to before they come; None if they are not."""
        fixed = self.collate is default_collate and isinstance(self.item, Mapping) and IDS in self.item
        return len(self.item[IDS]) if fixed else None


class RawExamples(Dataset[Any]):
    """Test examples in the form of training's.

    Strings, pairs of strings, and rows that hold a text which training's examples hold as token ids are tokenised.
    Anything else is given to training's collate function as it is. That may need labels, which texts lack: it is lent
    those of a training example, and the batch loses them again.

    Attributes:
        own: the test examples, as they were passed.
        tokenizer: of the module or its datamodule; None without one.

    Args:
        rows: the test examples, as they were passed.
        collation: how batches are made of them; by default as ``tokenizer.pad`` does.
        tokenizer: of the module or its datamodule; None without one.
        label_names: those that the module tells, by number.
        most_tokens: how many the model takes; None if that is not known.

    Raises:
        ValueError: if an example cannot be read or put into a batch; the message says what to do.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        collation: Collation | None,
        tokenizer: Any,
        *,
        label_names: Mapping[int, str],
        most_tokens: int | None,
    ) -> None:
        self.own = rows
        self.tokenizer = tokenizer
        if collation is None and hasattr(tokenizer, "pad"):
            collation = Collation(partial(tokenizer.pad, return_tensors="pt"))
        if collation is None:
            raise ValueError(
                "It is not known how training made batches of its examples: there is no tokenizer on the module or its "
                "datamodule, and no training loader. Pass that as train_dataloaders=..., or the datamodule as "
                f"datamodule=.... {BY_HAND}"
            )
        self._collation = collation
        self._label_numbers = {name: number for number, name in label_names.items()}
        self._most_tokens = most_tokens
        self._is_labelled = has_label(rows[0])
        self._lends_labels = False
        self._own_names: dict[str, bool] = {}
        self.collate([self[0]])
        if self._lends_labels:
            self._check_lent()

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> Any:
        row = self.own[index]
        if has_label(row) != self._is_labelled:
            which, other = ("has no label", "has one") if self._is_labelled else ("has a label", "has none")
            raise ValueError(f"Test example {index} {which}, but the first one {other}. Ask about them one by one.")
        item = self._item(row)
        return self._labelled(item, row, self._collation.item) if isinstance(item, Mapping) else item

    def cut_at(self, n_tokens: int | None) -> None:
        """Let no text have more tokens than the longest of training, if that is known."""
        known = [each for each in (n_tokens, self._most_tokens) if each is not None]
        self._most_tokens = min(known, default=None)

    def loader(self) -> DataLoader[Any]:
        """A loader of all."""
        collate = Collated(self._collation.collate, self)
        return DataLoader(self, batch_size=self._collation.batch_size, collate_fn=collate)

    def texts(self) -> list[RawText] | None:
        """The texts of all examples as they were written; None where they are not known."""
        found: list[RawText] = []
        for index in range(len(self)):
            row = self.own[index]
            is_tokenised = isinstance(row, Mapping) and IDS in row
            text = row.get("text") if is_tokenised else text_of(row)
            if text is None:
                return None
            found.append(text)
        return found

    def collate(self, items: Any) -> Any:
        """A batch, by training's function, without labels that were lent.

        Raises:
            ValueError: if that function fails, or if the labels cannot be told from the rest of the batch.
        """
        try:
            batch = self._collation.collate(items)
        except Exception as error:  # whatever a collate function of the user's raises
            raise ValueError(
                f"The collate function of training, {self._name}, makes no batch of these test examples: "
                f"{type(error).__name__}: {error}. {self._both_forms}. {BY_HAND}"
            ) from error
        if not self._lends_labels:
            return batch
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"The batches of training are of the form {described_batch(batch)}, of which texts without labels "
                f'cannot be made. Pass rows with labels, {{"text": ..., "label": ...}}. Or: {BY_HAND}'
            )
        without = copy(batch)
        for name in LABELS:
            without.pop(name, None)  # type: ignore[attr-defined]
        return without

    def _check_lent(self) -> None:
        """Check that a label leaves nothing in a batch but itself, whichever is lent.

        Raises:
            ValueError: if it does, as decoder inputs that are made of it.
        """
        item = self._item(self.own[0])
        hashes = []
        with random_state_kept():
            for like in (self._collation.item, *self._collation.items):
                seeded()  # the collate function may draw at random
                hashes.append(hash_of(self.collate([self._labelled(item, self.own[0], like)])))
        if hashes[0] == hashes[1] and len(set(hashes)) > 1:
            raise ValueError(
                f"The collate function of training, {self._name}, makes more of an example's label than the labels of "
                f"a batch, so that examples without one have no batch. Pass rows with labels. Or: {BY_HAND}"
            )

    @property
    def _name(self) -> str:
        own = self._collation.collate
        function: Any = own.func if isinstance(own, partial) else own
        return str(getattr(function, "__qualname__", type(function).__name__))

    @property
    def _both_forms(self) -> str:
        """What the examples are, and what those of training are."""
        like = self._collation.item
        of_training = "" if like is None else f", but that of training is {described(like)}"
        return f"The first test example is {described(self.own[0])}{of_training}"

    def _item(self, row: Any) -> Any:
        """A test example in the form of training's, without regard to its label."""
        like = self._collation.item
        if like is not None and is_alike(row, like):
            return row
        is_row = isinstance(row, Mapping)
        text = None if is_row and IDS in row else text_of(row)
        reads_ids = like is None or (isinstance(like, Mapping) and IDS in like)
        if text is not None and reads_ids:
            return self._encoded(text)
        columns = text_columns(row)
        if is_row and IDS not in row and reads_ids and columns:
            raise ValueError(
                f"The rows hold several texts ({', '.join(columns)}), and which of them training read is not known. "
                f"Pass the texts themselves, as in [row[{columns[0]!r}] for row in rows], or pairs of them."
            )
        if text is not None and len(text_columns(like)) == 1:
            return {text_columns(like)[0]: text}
        if text is None and is_row and (like is None or isinstance(like, Mapping)):
            return row
        raise ValueError(
            f"The test examples cannot be brought into the form of training's. {self._both_forms}. {BY_HAND}"
        )

    def _encoded(self, text: RawText) -> dict[str, Any]:
        """A text's token ids, and what the tokenizer tells with them."""
        if not callable(self.tokenizer):
            raise ValueError(
                "Texts need a tokenizer, but there is none on the module or its datamodule. Name it self.tokenizer. "
                f"Or: {BY_HAND}"
            )
        fixed = self._collation.n_padded
        limit = self._most_tokens if fixed is None else fixed
        encoded = self.tokenizer(
            *(text if isinstance(text, tuple) else (text,)),
            truncation=limit is not None,
            max_length=limit,
            padding=False if fixed is None else "max_length",
        )
        return dict(encoded)

    def _labelled(self, item: Mapping[str, Any], row: Any, like: Any) -> Mapping[str, Any]:
        """An example with what a training example has, its label under that's name for it, or with its label lent."""
        given = {name: row[name] for name in LABELS if self._is_labelled and row.get(name) is not None}
        if not isinstance(like, Mapping):
            others = {name: value for name, value in item.items() if name not in LABELS and not isinstance(value, str)}
            return others | {"labels" if name == "label" else name: self._label(given[name], 0) for name in given}
        wanted = [name for name in LABELS if name in like]
        if item.keys() == like.keys() and all(isinstance(item[name], type(like[name])) for name in like):
            return item
        named = dict.fromkeys(wanted, next(iter(given.values()))) | given if len(wanted) == 1 and given else given
        labels = {}
        for name in wanted:
            if name in named:
                labels[name] = self._label(named[name], like[name])
            elif self._are_own(name):  # a language model's
                labels[name] = own_labels(item, self._collation.items, name)
            else:
                labels[name] = lent(like, name, item)
                self._lends_labels = True
        known = [name for name in item if name in like and name not in LABELS]
        return {name: typed(item[name], like[name]) for name in known} | labels

    def _are_own(self, name: str) -> bool:
        """Whether training's labels of a name are token ids."""
        if name not in self._own_names:
            self._own_names[name] = are_own_labels(self._collation.items, name)
        return self._own_names[name]

    def _label(self, value: Any, like: Any) -> Any:
        """A label as training has it: a number where it is a class's name."""
        if isinstance(value, str) and not isinstance(like, str):
            if value not in self._label_numbers:
                known = ", ".join(map(repr, self._label_numbers)) or "no names of labels (influence_label_names)"
                raise ValueError(f"The label {value!r} is none of the model's, which tells {known}.")
            value = self._label_numbers[value]
        return typed(value, like)


@dataclass(frozen=True)
class Collated:
    """Makes batches of raw examples.

    Attributes:
        own: training's function.
        examples: the examples.
    """

    own: Callable[[Any], Any]
    examples: RawExamples

    def __call__(self, items: Any) -> Any:
        """A batch."""
        return self.examples.collate(items)


def _itself(item: Any) -> Any:
    return item


def _nothing() -> None:
    """Nothing has to be done before an example is read."""
