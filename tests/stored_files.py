"""Files on disk: damaged, and measured."""

from __future__ import annotations

from lightning_tracin.gradients.ragged import Ragged
from lightning_tracin.gradients.rows import Dtype
from lightning_tracin.storage.encoding import encode


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncated(path, n_bytes):
    path.write_bytes(path.read_bytes()[:n_bytes])


def encoded_bytes(block: Ragged, dtype: Dtype) -> int:
    """What a block's tensors take on disk, with directions of a type."""
    return sum(tensor.nbytes for tensor in encode(block.as_dtype(dtype)).values())


def bytes_of_tensors(folder, names="*.safetensors") -> int:
    """What the tensors in a folder's files take, without the files' headers."""
    contents = [file.read_bytes() for file in folder.rglob(names)]
    return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in contents)
