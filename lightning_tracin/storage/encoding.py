"""How blocks of gradients and texts are encoded on disk, and the options that make them smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_tracin.gradients.factor_gradients import FactorGradients
from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import Dtype, unit_rows
from lightning_tracin.gradients.sites import BLOCKS, Gradients, Site
from lightning_tracin.gradients.word_gradients import WordGradients
from lightning_tracin.storage.sizes import LayerSize, components_size


@dataclass(frozen=True)
class StorageOptions:
    """The options that save space, as ``TracInCallback`` takes them.

    Attributes:
        dtype: the type that directions are stored in.
        top_words: number of words of largest gradient norm that are stored of each example; None for all.
        projection: random projection of directions: a size for the gradients of words, or a pair (a, b) for the
            gradients of linear layers at the output and at the input; None for no projection.
        rank: number of K-FAC's components of inputs and of output gradients, of which a matrix is stored at layers with
            several positions, where that is smaller; None for whole gradients.
    """

    dtype: Dtype
    top_words: int | None = None
    projection: int | tuple[int, int] | None = None
    rank: tuple[int, int] | None = None

    def applied(self, site: Site, size: LayerSize) -> Site:
        """The site in the smallest form that these options allow.

        Args:
            site: the site as it was captured.
            size: of the gradients there.

        Raises:
            ValueError: if a projection would not make word gradients smaller.
        """
        if size.has_words:
            (hidden,) = size.widths
            width = self.projection if isinstance(self.projection, int) else None
            if width is not None and width >= hidden:
                raise ValueError(
                    f"projection={width} saves nothing: word gradients have {hidden} numbers for each word."
                )
            return replace(site, top_words=self.top_words, projection=None if width is None else (width,))
        if self.rank is not None:
            rank = self._rank_at(size)
            return replace(site, shape="factors" if rank is None else "matrix", rank=rank)
        shape = size.shape(self.dtype, self.projection)
        pair = self.projection if isinstance(self.projection, tuple) and shape == "matrix" else None
        return replace(site, shape=shape, projection=pair)

    def nbytes(self, size: LayerSize) -> float:
        """Bytes of an example's gradient on disk."""
        if self.rank is None or size.has_words:
            return size.nbytes(self.dtype, self.top_words, self.projection)
        rank = self._rank_at(size)
        return size.factors(self.dtype) if rank is None else size.nbytes(self.dtype, None, rank[::-1])

    def components(self, size: LayerSize) -> int:
        """Bytes of K-FAC's components at a checkpoint; 0 where gradients are not of these."""
        rank = None if size.has_words else self._rank_at(size)
        return 0 if rank is None else components_size((size.widths[1], rank[0]), (size.widths[0], rank[1]))

    def _rank_at(self, size: LayerSize) -> tuple[int, int] | None:
        """The rank at a linear layer; None where factors are smaller, or have one position, which no matrix adds up."""
        if self.rank is None or size.has_one_row or size.shape(self.dtype, self.rank[::-1]) == "factors":
            return None
        return self.rank


def encode(block: Ragged) -> dict[str, Tensor]:
    """The tensors of a block as a shard stores them: integers in 32 bits, and each run of equal tokens once."""
    columns = integers_in_32_bits(block.columns)
    if isinstance(block, WordGradients):
        tokens, counts = torch.unique_consecutive(columns["tokens"], return_counts=True)
        columns |= {"tokens": tokens, "offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)])}
    return columns


def decode(kind: str, stored: Mapping[str, Tensor], rows: Tensor | slice, n_examples: int) -> Ragged:
    """The block that :func:`encode` encoded, with the given rows only.

    Args:
        kind: "words", "factors", "matrix" or "texts".
        stored: the tensors of a shard.
        rows: row numbers, or a slice, which leaves the rows memory-mapped.
        n_examples: number of examples in the shard.
    """
    block_type = BLOCKS[kind]
    columns = {
        name: column if name in block_type.PER_EXAMPLE else column[rows]
        for name, column in stored.items()
        if name not in ("tokens", "offsets")
    }
    if "offsets" in stored:
        columns["tokens"] = torch.repeat_interleave(stored["tokens"], stored["offsets"].diff())[rows]
    columns = integers_in_64_bits(columns)
    if block_type is FactorGradients and columns["inputs"].dtype == torch.int8:
        columns |= {name: unit_rows(columns[name].float())[1] for name in ("inputs", "deltas")}
    return block_type(n_examples=n_examples, **columns)


def size_of_captured(gradients: Gradients) -> LayerSize:
    """How large the gradients of a few examples are, as they were captured: words, or factors."""
    columns = [gradients.deltas, gradients.inputs] if isinstance(gradients, FactorGradients) else [gradients.directions]
    return LayerSize(gradients.rows_by_example().tolist(), tuple(column.shape[1] for column in columns))


def integers_in_32_bits(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns as they are stored: int64 becomes int32, other types stay."""
    return {name: column.int() if column.dtype == torch.int64 else column for name, column in columns.items()}


def integers_in_64_bits(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns as they are in memory: int32 becomes int64, other types stay."""
    return {name: column.long() if column.dtype == torch.int32 else column for name, column in columns.items()}
