"""Weights that training leaves as they are, such as a model under LoRA's adapters: stored once, beside the checkpoints.

A file of them is named by its own checksum, so it is never replaced by another. Each checkpoint names the files that it
shares, and can be read while the others are gone. A weight is only left to a shared file if it is, bit for bit, what
lies there: whatever moved it, the checkpoint then has its own, which counts before that of the shared file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from lightning_tracin.storage.files import hash_of_tensors, read_tensors, write_tensors

_SHARED = re.compile(r"frozen-[0-9a-f]{32}\.safetensors")
_NEW = "frozen.safetensors"  # in the folder of a checkpoint, until it has its name


def is_shared(name: str) -> bool:
    """Whether a file's name is that of weights which checkpoints share."""
    return _SHARED.fullmatch(name) is not None


def share_frozen(
    folder: Path, trace: Path, tensors: dict[str, Tensor], frozen: Collection[str], shared: Mapping[str, str]
) -> dict[str, str]:
    """Take those weights out of a checkpoint's that lie in shared files, and write those that are frozen first now.

    Args:
        folder: of the checkpoint.
        trace: the folder of the trace.
        tensors: the weights; those that are shared are taken out.
        frozen: names of those that no gradient moves.
        shared: the checksums of the files that the checkpoint before shares, by name.

    Returns:
        The checksums of the files that this checkpoint shares, by name.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if a shared file is not as it was written.
    """
    stored = {
        name: (file, stored_hash)
        for file, checksum in shared.items()
        for name, stored_hash in _hashes(trace / file, checksum).items()
    }
    found: dict[str, str] = {}
    new: dict[str, Tensor] = {}
    for name in [name for name in tensors if name in frozen]:
        if name not in stored:
            new[name] = tensors.pop(name)
        elif stored[name][1] == hash_of_tensors({name: tensors[name]}):
            file = stored[name][0]
            found[file] = shared[file]
            del tensors[name]
    if new:
        checksum = write_tensors(folder / _NEW, new)
        file = f"frozen-{checksum}.safetensors"
        (folder / _NEW).replace(trace / file)
        found[file] = checksum
    return found


def remove_unshared(trace: Path, kept: Collection[str]) -> None:
    """Remove files of frozen weights that no checkpoint shares any more.

    Args:
        trace: the folder of the trace.
        kept: names of the files that some do.
    """
    for path in trace.glob("frozen-*.safetensors"):
        if is_shared(path.name) and path.name not in kept and not path.is_symlink():
            path.unlink()


@cache
def _hashes(path: Path, checksum: str) -> dict[str, str]:
    """A hash of each tensor in a file, by name; a process reads it once."""
    return {name: hash_of_tensors({name: tensor}) for name, tensor in read_tensors(path, checksum)[0].items()}
