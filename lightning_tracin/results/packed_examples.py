"""Examples in words as a saved result holds them: each by itself as compressed JSON, checked when it is read."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from lightning_tracin.gradients.printable import storable
from lightning_tracin.report.explanation import Example
from lightning_tracin.storage.files import damage_named, require_small

_MOST_BYTES = 64 * 2**20  # of the JSON of one example

_MOST_TOKEN = 2**31 - 1

_REMEMBERED = 4096  # So many examples are remembered as they were read: many test examples list the same.

REPAIR = "Restore the file from a copy, or ask trainer.influence again."


class PackedExamples(Mapping[int, Example]):
    """Examples by number, in little memory: whatever fields an :class:`Example` has, they are packed and come back.

    Args:
        numbers: (n,) int64, ascending: the rows of test examples, or the indices of training examples.
        indices: (n,) int64, the index of each in its data set.
        offsets: (n + 1,) int64, where the JSON of each begins in the content.
        content: uint8, the JSON of all, each compressed by zlib.
        path: the file that it came from, for errors; None for what this process has packed.
    """

    def __init__(
        self, numbers: Tensor, indices: Tensor, offsets: Tensor, content: Tensor, path: Path | None = None
    ) -> None:
        self.numbers = numbers
        self.indices = indices
        self.offsets = offsets
        self.content = content
        self.path = path
        self._places: dict[int, int] | None = None
        self._read: dict[int, Example] = {}

    @classmethod
    def of(cls, examples: Iterable[tuple[int, Example]]) -> PackedExamples:
        """Pack examples, which come by ascending number.

        Raises:
            ValueError: if one is too long to be read again.
        """
        numbers, indices, pieces = list[int](), list[int](), list[bytes]()
        for number, example in examples:
            text = json.dumps(msgspec.to_builtins(example), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            encoded = storable(text).encode()
            try:
                require_small(encoded)
            except ValueError as error:
                raise ValueError(
                    f"Example {example.index}, of {len(example.ids):,} tokens, is too long for the file of a result: "
                    f"{error}. With save(path, k=0) the file holds scores alone."
                ) from error
            numbers.append(number)
            indices.append(example.index)
            pieces.append(zlib.compress(encoded))
        content = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8) if pieces else torch.empty(0)
        offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
        counted = [torch.tensor(each, dtype=torch.int64) for each in (numbers, indices)]
        return cls(counted[0], counted[1], offsets, content.to(torch.uint8))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers.tolist())

    def __contains__(self, number: object) -> bool:
        return number in self._place_of

    def __getitem__(self, number: int) -> Example:
        """One example.

        Raises:
            KeyError: if it is not held.
            ValueError: if it is none, in a file that somebody made.
        """
        place = self._place_of[number]
        if place not in self._read:
            start, stop = self.offsets[place : place + 2].tolist()
            if len(self._read) >= _REMEMBERED:
                self._read.clear()
            with damage_named(self.path or Path("The result"), REPAIR):
                self._read[place] = _unpacked(self.content[start:stop].numpy().tobytes(), int(self.indices[place]))
        return self._read[place]

    @property
    def _place_of(self) -> dict[int, int]:
        if self._places is None:
            self._places = {number: place for place, number in enumerate(self.numbers.tolist())}
        return self._places


def _unpacked(content: bytes, index: int) -> Example:
    """The example of an index from compressed JSON.

    Raises:
        ValueError: if it is none, or would take too much memory.
    """
    reader = zlib.decompressobj()
    try:
        encoded = reader.decompress(content, _MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"an example cannot be read: {error}") from error
    if not reader.eof or reader.unused_data:
        raise ValueError("an example is not whole, or too long")
    require_small(encoded)
    example = msgspec.json.decode(encoded, type=Example)
    if example.index != index:
        raise ValueError(f"example {example.index} stands where {index} should")
    n_tokens = len(example.ids)
    if not all(0 <= place < n_tokens for word in example.words for place in word.places):
        raise ValueError(f"a word of example {example.index} has none of its {n_tokens} tokens")
    if not all(0 <= token <= _MOST_TOKEN for token in example.ids):
        raise ValueError(f"example {example.index} has tokens that are none")
    if example.confidence is not None and not (math.isfinite(example.confidence) and 0 <= example.confidence < 1.001):
        raise ValueError(f"example {example.index} has a prediction with probability {example.confidence}")
    return example
