"""Gradients and texts on disk: shards of safetensors, each with a fixed number of examples, memory-mapped when read.

A folder holds ``00000.safetensors``, ``00001.safetensors``, ... and ``index.json``, which is written last. Shard ``j``
holds examples ``j * shard_examples`` up to ``(j + 1) * shard_examples``. Word gradients are sorted by token, so that a
query reads only the rows of the words that it asks for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_tracin.gradients import Gradients, LinearGradients, Texts, WordGradients

Dtype: TypeAlias = Literal["float32", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}

#: What a shard can hold.
Block: TypeAlias = Gradients | Texts

# Small enough that a few shards fit into memory beside a model, large enough that reading one is one long read.
_SHARD_BYTES = 64 * 2**20
_SHARD_EXAMPLES = 4096


class ShardWriter:
    """Writes the blocks of a training set, handed over in the order of the data set, into shards.

    Args:
        folder: an existing, empty folder.
        dtype: what unit vectors are stored in. "float16" is exact to about 5e-4 of each row's norm, whatever the norm.
        shard_examples: examples in each shard; by default so many that a shard holds about 64 MiB.
    """

    def __init__(self, folder: Path, *, dtype: Dtype = "float32", shard_examples: int | None = None) -> None:
        self.folder = folder
        self.dtype = dtype
        self.shard_examples = shard_examples
        self.n_examples = 0
        self._kind: str | None = None
        self._waiting: list[Block] = []
        self._n_waiting = 0
        self._n_shards = 0

    def add(self, block: Block) -> None:
        """Take the next examples; full shards are written at once."""
        self._kind = _KINDS[type(block)]
        if self.shard_examples is None:
            per_example = encoded_bytes(block, self.dtype) / block.n_examples
            self.shard_examples = max(1, min(_SHARD_EXAMPLES, int(_SHARD_BYTES / max(per_example, 1))))
        self._waiting.append(block)
        self._n_waiting += block.n_examples
        self.n_examples += block.n_examples
        if self._n_waiting >= self.shard_examples:
            self._flush(self.shard_examples)

    def close(self) -> None:
        """Write what is left, then the index that makes the folder readable."""
        if self._n_waiting:
            self._flush(1)
        index = {
            "kind": self._kind,
            "dtype": self.dtype,
            "n_examples": self.n_examples,
            "shard_examples": self.shard_examples,
        }
        write_json(self.folder / "index.json", index)

    def _flush(self, n_least: int) -> None:
        """Write shards as long as at least ``n_least`` examples wait."""
        assert self.shard_examples is not None
        block = _cat(self._waiting)
        start = 0
        while block.n_examples - start >= n_least:
            stop = min(start + self.shard_examples, block.n_examples)
            write_tensors(_shard(self.folder, self._n_shards), encode(block.slice(start, stop), self.dtype))
            self._n_shards += 1
            start = stop
        self._n_waiting = block.n_examples - start
        self._waiting = [block.slice(start, block.n_examples)] if self._n_waiting else []


@dataclass(frozen=True)
class Shards:
    """The blocks of a training set, as :class:`ShardWriter` left them.

    Attributes:
        folder: where the shards lie.
        n_examples: number of examples over all shards.
        shard_examples: number of examples in each shard but the last.
        dtype: what unit vectors are stored in.
    """

    folder: Path
    kind: str
    n_examples: int
    shard_examples: int
    dtype: Dtype

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Open a folder of shards.

        Raises:
            FileNotFoundError: if the folder has no index: nothing was stored there, or not to the end.
        """
        return cls(folder, **read_json(folder / "index.json"))

    def __len__(self) -> int:
        return -(-self.n_examples // self.shard_examples)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First example of a shard, and one past its last."""
        return shard * self.shard_examples, min((shard + 1) * self.shard_examples, self.n_examples)

    def read(self, shard: int, *, tokens: Tensor | None = None) -> Any:
        """A shard's block; examples are counted from 0 inside the shard.

        Args:
            shard: number of the shard.
            tokens: token ids; word gradients of other tokens are not read from disk.
        """
        start, stop = self.bounds(shard)
        stored = self._stored(shard)
        rows: Tensor | slice = slice(None)
        if tokens is not None:
            wanted = torch.nonzero(torch.isin(stored["tokens"], tokens.int()))[:, 0]
            rows = _ranges(stored["offsets"][wanted], stored["offsets"][wanted + 1])
        return _decode(self.kind, stored, rows, stop - start)

    def read_example(self, example: int) -> Any:
        """One example's block, of that one example."""
        shard, offset = divmod(example, self.shard_examples)
        start, stop = self.bounds(shard)
        stored = self._stored(shard)
        rows = torch.nonzero(stored["examples"] == offset)[:, 0]
        return _decode(self.kind, stored, rows, stop - start).slice(offset, offset + 1)

    def _stored(self, shard: int) -> dict[str, Tensor]:
        """The tensors of a shard, memory-mapped."""
        with safe_open(_shard(self.folder, shard), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def encode(block: Block, dtype: Dtype) -> dict[str, Tensor]:
    """The tensors that a shard of this block holds on disk."""
    if isinstance(block, Texts):
        return {"examples": block.examples.int(), "ids": block.ids.int(), "labels": block.labels}
    if isinstance(block, WordGradients):
        tokens, counts = torch.unique_consecutive(block.tokens, return_counts=True)
        return {
            "tokens": tokens.int(),
            "offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "examples": block.examples.int(),
            "norms": block.norms,
            "directions": block.directions.to(DTYPES[dtype]),
        }
    return {
        "examples": block.examples.int(),
        "input_norms": block.input_norms,
        "inputs": block.inputs.to(DTYPES[dtype]),
        "delta_norms": block.delta_norms,
        "deltas": block.deltas.to(DTYPES[dtype]),
    }


def encoded_bytes(block: Block, dtype: Dtype) -> int:
    """Bytes that this block takes on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in encode(block, dtype).values())


def _decode(kind: str, stored: Mapping[str, Tensor], rows: Tensor | slice, n_examples: int) -> Block:
    """The block that a shard's tensors hold, of the given rows only."""
    examples = stored["examples"][rows].long()
    if kind == "texts":
        return Texts(n_examples, examples, stored["ids"][rows].long(), stored["labels"])
    if kind == "words":
        tokens = torch.repeat_interleave(stored["tokens"].long(), stored["offsets"].diff())
        return WordGradients(n_examples, examples, tokens[rows], stored["norms"][rows], stored["directions"][rows])
    factors = (stored[name][rows] for name in ("input_norms", "inputs", "delta_norms", "deltas"))
    return LinearGradients(n_examples, examples, *factors)


def _ranges(starts: Tensor, stops: Tensor) -> Tensor:
    """The numbers from each start up to its stop, one range after the other."""
    lengths = stops - starts
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears whole or not at all."""
    with _appearing_file(path) as partial:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=dict(metadata or {})
        )
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    with _appearing_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _appearing_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes its name when it is on disk and vanishes when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


_KINDS: dict[type, str] = {WordGradients: "words", LinearGradients: "linear", Texts: "texts"}


def _cat(blocks: list[Any]) -> Any:
    return type(blocks[0]).cat(blocks)
