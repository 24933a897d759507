"""K-FAC's components of a layer at a checkpoint in a file, beside the gradients that are projected to them."""

from __future__ import annotations

from pathlib import Path

from lightning_tracin.gradients.components import Components
from lightning_tracin.gradients.kronecker import KroneckerFactors
from lightning_tracin.storage.files import read_tensors, write_tensors
from lightning_tracin.storage.layouts import ComponentsLayout

#: The name of the file, in a folder of shards.
COMPONENTS = "components.safetensors"


def write_factors(path: Path, factors: KroneckerFactors) -> str:
    """Write a safetensors file atomically, and return its checksum.

    Raises:
        OSError: if the file cannot be written.
    """
    sides = {"inputs": factors.inputs, "deltas": factors.deltas}
    tensors = {f"{side}_basis": each.basis for side, each in sides.items()}
    tensors |= {f"{side}_values": each.values for side, each in sides.items()}
    return write_tensors(path, tensors, {f"{side}_mean": repr(each.mean) for side, each in sides.items()})


def read_factors(path: Path, checksum: str, rank: tuple[int, int], *, within: Path) -> KroneckerFactors:
    """Read the file that :func:`write_factors` wrote.

    Args:
        path: the file.
        checksum: of its bytes.
        rank: see :class:`~lightning_tracin.storage.layouts.ComponentsLayout`.
        within: the folder that no link may lead out of.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not as it was written.
    """
    tensors, metadata = read_tensors(path, checksum, ComponentsLayout(rank), within=within)
    inputs, deltas = (
        Components(tensors[f"{side}_basis"], tensors[f"{side}_values"], float(metadata[f"{side}_mean"]))
        for side in ("inputs", "deltas")
    )
    return KroneckerFactors(inputs, deltas)
