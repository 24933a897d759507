"""The size of a trace, measured on another one of the same model."""

from __future__ import annotations

from pathlib import Path

from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.checkpoint import WEIGHTS, Checkpoint, drawn_at
from lightning_tracin.storage.components import COMPONENTS
from lightning_tracin.storage.files import size_of
from lightning_tracin.storage.second_moments import moments_file
from lightning_tracin.storage.sizes import TraceSize
from lightning_tracin.storage.trace import Trace


def size_like_trace(folder: str, examples: int | None, checkpoints: int | None) -> TraceSize:
    """The size of a trace like another, of so many examples and checkpoints.

    Args:
        folder: of the other trace.
        examples: by default as many as it has.
        checkpoints: by default as many as it has.

    Raises:
        FileNotFoundError: if there is no trace in the folder.
        ValueError: if it has no checkpoint, or one without gradients.
    """
    trace = Trace(folder)
    found = trace.checkpoints
    sites = [site for site in trace.sites if found and all(each.has_gradients(site) for each in found)]
    if not sites:
        raise ValueError(f"The trace in {folder} stores no gradients yet: there is nothing to measure.")
    drawn = sum(len(drawn_at(each)) for each in found)
    n_read = trace.n_train - len(trace.undrawn)
    gradients = {site.name: sum(each.gradients(site).nbytes for each in found) / drawn for site in sites}
    of_all, of_each = _bytes_below(trace.path / "texts"), [_bytes_below(each.path / "texts") for each in found]
    texts_each = not of_all and all(of_each)  # else what a checkpoint lacks was stored before it, once and for all
    n_train = n_read if examples is None else examples
    return TraceSize(
        weights=sum(size_of(each.path / WEIGHTS) for each in found if each.keeps_weights) / len(found),
        frozen=sum(size_of(trace.path / name) for name in {name for each in found for name in each.shared}),
        moments=max(_bytes_of_moments(each) for each in found),
        gradients=gradients,
        texts=n_train / n_read * (of_all + sum(of_each)) / (len(found) if texts_each else 1),
        n_train=n_train,
        drawn=n_train * drawn / (len(found) * n_read),
        checkpoints=len(found) if checkpoints is None else checkpoints,
        texts_each=texts_each,
        components=max(sum(_bytes_of_components(each, site) for site in sites) for each in found),
    )


def _bytes_of_moments(checkpoint: Checkpoint) -> int:
    names = [name for site in checkpoint.sites if (name := moments_file(site)) in checkpoint.checksums]
    return sum(size_of(checkpoint.path / name) for name in names)


def _bytes_of_components(checkpoint: Checkpoint, site: Site) -> int:
    return 0 if site.rank is None else size_of(checkpoint.path / site.key / COMPONENTS)


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
