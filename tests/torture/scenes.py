"""What a killed process was in the middle of, how its user goes on, and what must hold in between and in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import Sampler
from toy import N_TRAIN, loader, quiet, test_texts, texts
from variants import Reproducible

from lightning_tracin import InfluenceResult, Trace, TracInCallback
from lightning_tracin.storage.own_files import has_trace

EPOCHS = 3
_RESULT = "result.safetensors"
CACHES = ("checkpoint", "training", "on_demand")
METHODS = ("tracin-we", "tracin-last")

#: Files of others around a trace, and in its folders.
FOREIGN = (
    "notes.txt",
    ".lock",
    "mine.partial",
    "images/a.png",
    "run/trace/notes.txt",
    "run/trace/config.json",
    "run/trace/mine.partial/a",
    "run/trace/index.json",
    "run/trace/checkpoints/best.ckpt",
    "run/trace/checkpoints/step-000000005.ckpt",
)


@dataclass(frozen=True)
class Scene:
    """One thing that a process may be killed in the middle of.

    Attributes:
        name: of the scene.
        begin: makes what is there before, in an empty folder.
        act: what is killed.
        go_on: what the user does afterwards, until it succeeds.
        trace: the folder of the trace that is written, in the scene's folder.
        foreign: further files of others, that lie in folders of the trace that is there before.
        untouched: a folder that must stay as it is byte for byte.
        look: numbers beside the trace's, which are always those before or those in the end.
    """

    name: str
    begin: Callable[[Path], None]
    act: Callable[[Path], Any]
    go_on: Callable[[Path], Any]
    trace: str = "run/trace"
    foreign: tuple[str, ...] = ()
    untouched: str | None = None
    look: Callable[[Path], dict[str, torch.Tensor]] | None = None


class PartlyFrozen(Reproducible):
    """Weights that no step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)


class Halves(Sampler[int]):
    """One half of the examples in each epoch, in turn."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N_TRAIN // 2

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch % 2, N_TRAIN, 2))


def fit(folder: Path, cache: str, *, run: str = "run", epochs: int = EPOCHS, seed: int = 0, **options: Any) -> None:
    """A fit that saves Lightning's checkpoints beside the trace's; ``seed`` makes another one of it."""
    ckpt_path, sampler = options.pop("ckpt_path", None), options.pop("sampler", None)
    module = options.pop("module", Reproducible)()
    pl.seed_everything(seed, verbose=False)
    recording = TracInCallback(dtype="float32", cache=cache, on_error="raise", **options)
    saving = ModelCheckpoint(folder / run / "trace" / "checkpoints", save_top_k=-1, filename="{epoch}")
    root = {"default_root_dir": folder / run, "enable_checkpointing": True}
    trainer = quiet(callbacks=[recording, saving], max_epochs=epochs, **root)
    trainer.fit(module, loader(sampler=sampler), ckpt_path=ckpt_path)


def go_on_with_fit(folder: Path, cache: str, **options: Any) -> None:
    """Resume from the newest of Lightning's checkpoints that opens, or else begin again."""
    newest = next(_opening(folder / "run" / "trace" / "checkpoints"), None)
    fit(folder, cache, **({"overwrite": True} if newest is None else {"ckpt_path": newest}), **options)


def ask(folder: Path, trace: str = "run/trace", methods: tuple[str, ...] = METHODS) -> dict[str, torch.Tensor]:
    """The scores that a trace gives, in another process than that of its fit."""
    return {
        method: quiet()
        .influence(
            loader(test_texts()), Reproducible(), trace=folder / trace, train_dataloaders=loader(), method=method
        )
        .scores
        for method in methods
    }


def save(folder: Path, seed: int) -> None:
    """A result into one file, by another seed that of other test examples."""
    data = loader(texts(6, seed=seed))
    quiet().influence(data, Reproducible(), trace=folder / "run" / "trace").save(folder / _RESULT)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    result = InfluenceResult.load(folder / _RESULT)
    assert result.scores is not None
    return {"scores": result.scores}


def _opening(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("epoch=*.ckpt"), reverse=True):
        try:
            torch.load(path, weights_only=False)
        except Exception:  # Lightning's file was cut short, not ours
            continue
        yield path


def _first_epoch(folder: Path) -> Path:
    return next(folder.glob("run/trace/checkpoints/epoch=0*.ckpt"))


def _fits(cache: str) -> Iterator[Scene]:
    def two_epochs(folder: Path) -> None:
        fit(folder, cache, epochs=2)

    def resume(folder: Path, run: str = "run") -> None:
        fit(folder, cache, run=run, ckpt_path=_first_epoch(folder))

    def branch(folder: Path) -> None:
        resume(folder, "other")

    def go_on_branching(folder: Path) -> None:
        fit(folder, cache, run="other", ckpt_path=_first_epoch(folder), overwrite=True)

    def replace(folder: Path) -> None:
        fit(folder, cache, overwrite=True)

    def another(folder: Path) -> None:
        fit(folder, cache, epochs=2, seed=1)

    def begin_nothing(folder: Path) -> None:
        pass

    def halves() -> dict[str, Any]:
        return {"sampler": Halves(), "every_n_epochs": 2, "epochs": 4}

    if cache != "training":  # which has lost the gradients of the epoch before it was resumed
        yield Scene(
            f"two epochs {cache}",
            begin_nothing,
            lambda folder: fit(folder, cache, **halves()),
            lambda folder: go_on_with_fit(folder, cache, **halves()),
        )
    inside = ("run/trace/checkpoints/step-000000005/note.txt", "run/trace/checkpoints/step-000000005/words.txt")
    yield Scene(f"fit {cache}", begin_nothing, lambda folder: fit(folder, cache), lambda f: go_on_with_fit(f, cache))
    yield Scene(f"resumed fit {cache}", two_epochs, resume, resume, foreign=inside)
    yield Scene(f"branch {cache}", two_epochs, branch, go_on_branching, "other/trace", inside, "run")
    yield Scene(f"replaced {cache}", another, replace, replace)


def _frozen() -> Iterator[Scene]:
    frozen = {"module": PartlyFrozen}

    def two_epochs(folder: Path) -> None:
        fit(folder, "checkpoint", epochs=2, **frozen)

    def act(folder: Path) -> None:
        fit(folder, "checkpoint", **frozen)

    def go_on(folder: Path) -> None:
        go_on_with_fit(folder, "checkpoint", **frozen)

    def resume(folder: Path, **options: Any) -> None:
        fit(folder, "checkpoint", ckpt_path=_first_epoch(folder), **frozen, **options)

    def branch(folder: Path) -> None:
        resume(folder, run="other")

    def go_on_branching(folder: Path) -> None:
        resume(folder, run="other", overwrite=True)

    yield Scene("partly frozen fit", lambda folder: None, act, go_on)
    yield Scene("partly frozen resumed", two_epochs, resume, resume)
    yield Scene("partly frozen branch", two_epochs, branch, go_on_branching, "other/trace", untouched="run")


def _queries() -> Iterator[Scene]:
    inside = ("run/trace/checkpoints/step-000000005/note.txt",)

    def with_a_result(folder: Path) -> None:
        fit(folder, "checkpoint")
        save(folder, seed=1)

    def save_another(folder: Path) -> None:
        save(folder, seed=2)

    yield Scene("saved result", with_a_result, save_another, save_another, look=saved)
    yield Scene("filling query", lambda folder: fit(folder, "on_demand"), ask, ask, foreign=inside)


def _past() -> Iterator[Scene]:
    def make(folder: Path) -> None:
        files = sorted((folder / "run" / "trace" / "checkpoints").glob("epoch=*.ckpt"))
        Trace.from_checkpoints(folder / "past" / "trace", files, Reproducible(), loader())

    def make_unless_made(folder: Path) -> None:
        if not has_trace(folder / "past" / "trace"):
            make(folder)

    yield Scene("past run", lambda f: fit(f, "on_demand"), make, make_unless_made, "past/trace", untouched="run")


SCENES = {scene.name: scene for cache in CACHES for scene in _fits(cache)}
SCENES |= {scene.name: scene for scene in (*_frozen(), *_queries(), *_past())}
