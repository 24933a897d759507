"""What a trace takes on disk, from numbers alone.

One formula, which a fit's first line, its errors about space and the command ``lightning-tracin estimate`` share; it is
written out in docs/costs.md. JSON files and the headers of safetensors files, some kilobytes each, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.filesize import decimal

#: Bytes of a number, by the name of its type.
NUMBER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

#: Of a text on disk: a token id, its mark and the number of its example; a label, and a set of labels.
TOKEN_BYTES, LABEL_BYTES = 12, 16

#: Ranks up to which words follow Zipf's law. Beyond, their frequency falls with a power that is larger by one, as
#: Ferrer i Cancho and Solé (2001, "Two regimes in the frequency of words") found.
_KERNEL_WORDS = 2000


@dataclass(frozen=True)
class LayerSize:
    """How large an example's gradient is at a layer.

    Attributes:
        rows: how many rows it has, for each of some examples: one for each distinct word, or for each position with a
            gradient.
        widths: (hidden,) at the word embedding table; at a linear layer (outputs, inputs), its bias among the inputs.
    """

    rows: Sequence[float]
    widths: tuple[int, ...]

    @property
    def has_words(self) -> bool:
        """Whether the layer is the word embedding table."""
        return len(self.widths) == 1

    @property
    def has_one_row(self) -> bool:
        """Whether no example has more than one."""
        return max(self.rows) <= 1

    def shape(
        self, dtype: str, projection: int | tuple[int, int] | None = None
    ) -> Literal["words", "factors", "matrix"]:
        """The form in which a trace stores gradients: at a linear layer, that which takes less space.

        At a layer with one output, a matrix saves less than ten bytes where examples have one position each. There it
        is factors, which tell residuals, too.
        """
        if self.has_words:
            return "words"
        few = max(self.rows) <= 1 and not isinstance(projection, tuple)
        return "factors" if few or self.factors(dtype) <= self._matrix(dtype, projection) else "matrix"

    def nbytes(
        self, dtype: str, top_words: int | None = None, projection: int | tuple[int, int] | None = None
    ) -> float:
        """Bytes of an example's gradient on disk, in that form, on the mean over the examples.

        Args:
            dtype: what directions are stored in.
            top_words: how many words of an example are stored at most.
            projection: a size for the gradients of words, or a pair (outputs, inputs) for those of linear layers.
        """
        if not self.has_words:
            is_factored = self.shape(dtype, projection) == "factors"
            return self.factors(dtype) if is_factored else self._matrix(dtype, projection)
        width = min(self.widths[0], projection) if isinstance(projection, int) else self.widths[0]
        return self._mean_rows(math.inf if top_words is None else top_words) * _directed_row(width, dtype)

    def _mean_rows(self, at_most: float = math.inf) -> float:
        """The mean number of rows, where no example has more than some."""
        return sum(min(each, at_most) for each in self.rows) / len(self.rows)

    def factors(self, dtype: str) -> float:
        """Bytes of an example's gradient as the factors of each position, on the mean over the examples."""
        return self._mean_rows() * (
            4 + 2 * 4 + sum(self.widths) * NUMBER_BYTES[dtype]
        )  # the example's number, two norms

    def _matrix(self, dtype: str, projection: int | tuple[int, int] | None) -> float:
        limits = projection if isinstance(projection, tuple) else self.widths
        n_out, n_in = (min(width, limit) for width, limit in zip(self.widths, limits, strict=True))
        return self._mean_rows(1) * _directed_row(n_out * n_in, dtype)


def _directed_row(width: int, dtype: str) -> int:
    """Bytes of a direction with its norm, its length (of whole numbers) and the number of its example."""
    return 4 + 4 + (4 if dtype == "int8" else 0) + width * NUMBER_BYTES[dtype]


@dataclass(frozen=True)
class TraceSize:
    """What a trace takes on disk, in bytes.

    Attributes:
        weights: of the weights of a checkpoint, tied ones once; 0 where none are kept.
        frozen: of the weights that all checkpoints share.
        moments: of Adam's second moments at the recorded layers, at a checkpoint.
        gradients: of an example's gradient, by the name of the method.
        texts: of token ids and labels: of all together, or with ``texts_each`` before each checkpoint.
        n_train: how many examples the training set has.
        drawn: how many of them training draws before each checkpoint.
        checkpoints: how many there will be; None if that is not known.
        texts_each: whether each checkpoint has texts of its own.
        components: of K-FAC's components, at a checkpoint.
    """

    weights: float
    frozen: float
    moments: float
    gradients: Mapping[str, float]
    texts: float
    n_train: int
    drawn: float
    checkpoints: int | None = 1
    texts_each: bool = False
    components: float = 0.0

    @property
    def all_gradients(self) -> float:
        """Bytes of all examples' gradients at a checkpoint."""
        return self.drawn * sum(self.gradients.values())

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint."""
        mask = self.n_train if self.drawn < self.n_train else 0
        texts = self.texts if self.texts_each else 0
        return self.weights + self.moments + self.components + self.all_gradients + mask + texts

    @property
    def once(self) -> float:
        """Bytes of what all checkpoints share."""
        return self.frozen + (0 if self.texts_each else self.texts)

    def of(self, checkpoints: int) -> float:
        """Bytes of a trace with so many checkpoints."""
        return self.once + checkpoints * self.checkpoint

    def __str__(self) -> str:
        """The sum in words, such as "3 checkpoints x (91 MB weights + 62 MB gradients) + 1 MB texts = 460 MB"."""
        parts = {"weights": self.weights, "moments": self.moments, "components": self.components}
        parts["gradients"] = self.all_gradients
        if self.texts_each:
            parts["texts"] = self.texts
        once = {"frozen weights": self.frozen, "texts": 0 if self.texts_each else self.texts}
        each = " + ".join(f"{decimal(int(size))} {name}" for name, size in parts.items() if size)
        shared = "".join(f" + {decimal(int(size))} {name}" for name, size in once.items() if size)
        if self.checkpoints is None:
            return f"for each checkpoint {each} = {decimal(int(self.checkpoint))}{f', once{shared}' if shared else ''}"
        number = f"{self.checkpoints} checkpoint{'s' * (self.checkpoints != 1)}"
        return f"{number} x ({each}){shared} = {decimal(int(self.of(self.checkpoints)))}"


def moments_size(rows: float, width: float, *, numbered: bool = False) -> float:
    """Bytes of Adam's second moments of a weight, in float32.

    Args:
        rows: of the weight; at the word embedding table those of words that were trained on.
        width: numbers in a row.
        numbered: whether rows are stored with their numbers, as at the word embedding table.
    """
    return rows * (4 * width + (8 if numbered else 0))


def components_size(*sides: tuple[int, int]) -> int:
    """Bytes of K-FAC's components: of each side, of inputs and of outputs, its width and the number of components."""
    return sum(min(width, rank) * (4 * width + 8) for width, rank in sides)


def distinct_words(vocabulary: int, drawn: float, exponent: float = 1.0) -> float:
    """How many different words there are among words drawn from a vocabulary, by Zipf's law.

    Args:
        vocabulary: how many words there are to draw.
        drawn: how many are drawn.
        exponent: of Zipf's law among the frequent ones; 1 in natural language.
    """
    ranks = np.arange(1, vocabulary + 1, dtype=np.float64)
    frequencies = ranks**-exponent * np.minimum(1.0, _KERNEL_WORDS / ranks)
    return float(-np.expm1(-drawn * frequencies / frequencies.sum()).sum())


def zipf_exponent(vocabulary: int, drawn: float, distinct: float) -> float:
    """The exponent of Zipf's law that a sample speaks for.

    Args:
        vocabulary: how many words there are to draw.
        drawn: how many the sample holds.
        distinct: how many different ones.
    """
    low, high = -1.0, 3.0
    for _ in range(20):
        middle = (low + high) / 2
        if distinct_words(vocabulary, drawn, middle) > distinct:
            low = middle
        else:
            high = middle
    return (low + high) / 2
