"""Texts as padded token ids, with a vocabulary of those tokens alone that occur in a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from benchmarks.evidence.texts import Text
from examples.data import packaged_minilm


@dataclass(frozen=True)
class Examples:
    """Labelled texts of a task.

    Attributes:
        ids: token ids in the task's own vocabulary, (n, T), 0 where padded.
        mask: 1 where a token is, (n, T).
        types: 1 in the second of two texts, (n, T).
        labels: (n,).
        texts: as they were written; the texts of a pair with a bar in between.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    labels: Tensor
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def with_labels(self, labels: Tensor) -> Examples:
        """The same texts with other labels, (n,)."""
        return Examples(self.ids, self.mask, self.types, labels, self.texts)


class Rows(Dataset[dict[str, Tensor]]):
    """Some of the examples, in an order, as rows of a Hugging Face batch.

    Args:
        examples: of which.
        indices: their places there.
    """

    def __init__(self, examples: Examples, indices: Sequence[int]) -> None:
        columns = (examples.ids, examples.mask, examples.types, examples.labels)
        names = ("input_ids", "attention_mask", "token_type_ids", "labels")
        self.indices = list(indices)
        self._rows = [
            dict(zip(names, row, strict=True)) for row in zip(*(each[self.indices] for each in columns), strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def trimmed(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of rows, as long as its longest text."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: each[:, :longest] if each.dim() == 2 else each for name, each in batch.items()}


class Vocabulary:
    """The tokens of a task, renumbered: embedding rows that no text of a task uses cost time and change nothing.

    It answers as a tokenizer does where words are shown and special tokens are named.

    Args:
        kept: of MiniLM's token ids those that occur, ascending, beginning with 0, the padding.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        tokenizer = _tokenizer()
        self._tokens: list[str] = tokenizer.convert_ids_to_tokens(kept.tolist())
        special = set(tokenizer.all_special_ids)
        self.all_special_ids = [new for new, old in enumerate(kept.tolist()) if old in special]

    def __len__(self) -> int:
        return len(self._tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of ids."""
        return [self._tokens[each] for each in ids]


def encoded(parts: Sequence[Sequence[Text]], n_tokens: int) -> tuple[list[Examples], Vocabulary]:
    """Examples for each part, cut at a number of tokens, and the vocabulary of all of them."""
    texts = [each for part in parts for each in part]
    firsts, seconds = [each.text for each in texts], [each.second for each in texts]
    rows: Any = _tokenizer()(
        firsts,
        seconds if any(seconds) else None,
        truncation=True,
        max_length=n_tokens,
        padding="max_length",
        return_tensors="pt",
    )
    # The padding comes first, also in a task whose texts are all cut, and none padded.
    padded = torch.cat([torch.zeros(1, dtype=torch.long), rows["input_ids"].flatten()])
    kept, numbers = torch.unique(padded, return_inverse=True)
    ids = numbers[1:].view_as(rows["input_ids"])
    shown = [f"{each.text} | {each.second}" if each.second else each.text for each in texts]
    labels = torch.tensor([each.label for each in texts])
    found, start = [], 0
    for part in parts:
        here = slice(start, start + len(part))
        columns = (ids[here], rows["attention_mask"][here], rows["token_type_ids"][here], labels[here])
        found.append(Examples(*columns, tuple(shown[here])))
        start += len(part)
    return found, Vocabulary(kept)


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(packaged_minilm())
