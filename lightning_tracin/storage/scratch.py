"""Temporary files for blocks that would otherwise take memory for as long as a query or a result exists."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.storage.files import read_tensors, write_tensors

_Block = TypeVar("_Block", bound=Ragged)


class Scratch:
    """A temporary folder of memory-mapped blocks and tensors, created with the first and removed with this object."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._n_blocks = 0

    def put(self, block: _Block) -> _Block:
        """Write a block to a file, and return it with its tensors memory-mapped from there.

        Raises:
            OSError: if the file cannot be written.
        """
        columns: dict[str, Any] = self._mapped(block.columns)
        return replace(block, **columns)

    def put_tensor(self, tensor: Tensor) -> Tensor:
        """As :meth:`put`, of a tensor."""
        return self._mapped({"tensor": tensor})["tensor"]

    def _mapped(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors from a file of their own, memory-mapped."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lightning_tracin-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{self._n_blocks:06d}.safetensors"
        self._n_blocks += 1
        return read_tensors(path, write_tensors(path, tensors))[0]
