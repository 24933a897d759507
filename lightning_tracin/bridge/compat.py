"""What differs between ``pytorch_lightning`` and ``lightning.pytorch``, and between versions of either.

The two packages hold the same classes twice, and each accepts only its own. A callback that inherits from both is
accepted by both. Private names of Lightning that have no public counterpart stand here too, one function each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter, Callback, Checkpoint, ProgressBar
from torch.optim import Optimizer

if TYPE_CHECKING or find_spec("lightning") is None:
    twin = pl
    DualCallback = Callback
    DualCheckpoint = Checkpoint
    DualPredictionWriter = BasePredictionWriter
    PROGRESS_BARS: tuple[type, ...] = (ProgressBar,)
    DATAMODULES: tuple[type, ...] = (pl.LightningDataModule,)
else:
    import lightning.pytorch as twin
    import lightning.pytorch.callbacks as twins

    class DualCallback(Callback, twins.Callback):
        """A callback for the trainers of both packages."""

    class DualCheckpoint(Checkpoint, twins.Checkpoint):
        """What Lightning takes for a kind of ModelCheckpoint, in either package."""

    class DualPredictionWriter(BasePredictionWriter, twins.BasePredictionWriter):
        """A prediction writer for the trainers of both packages."""

    PROGRESS_BARS = (ProgressBar, twins.ProgressBar)
    DATAMODULES = (pl.LightningDataModule, twin.LightningDataModule)


def lightning_of(thing: Any) -> Any:
    """The package, of the two, that a trainer or a module is of."""
    is_twin = twin is not pl and isinstance(thing, (twin.Trainer, twin.LightningModule))
    return twin if is_twin else pl


def configured_optimizers(module: pl.LightningModule) -> tuple[list[Optimizer], list[Any]]:
    """The optimizers that a module with a trainer makes, and what Lightning makes of its schedulers.

    Raises:
        Exception: whatever the module's ``configure_optimizers`` raises, and Lightning on what that returns.
    """
    core = import_module(f"{lightning_of(module).__name__}.core.optimizer")
    optimizers, schedulers = core._init_optimizers_and_lr_schedulers(module)
    return list(optimizers), list(schedulers)


def batch_to_device(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Move a batch as the fit loop does: all batch hooks of the module or the datamodule, then the precision's cast."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def logged_step(trainer: pl.Trainer) -> int:
    """The step that Lightning logs values of the present moment of a fit under."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def watch_training_loader(trainer: pl.Trainer, see: Callable[[Any], None]) -> Callable[[], None]:
    """Show every loader that a fit is about to read to a function, after Lightning has given it its sampler.

    Lightning has no hook between the two; the strategy's ``process_dataloader`` is the last to touch a loader.

    Args:
        trainer: the trainer whose fit it is.
        see: is called with the loader.

    Returns:
        What ends it.
    """
    strategy = trainer.strategy
    watching: list[Callable[[Any], None]] | None = getattr(strategy.process_dataloader, "watching", None)
    if watching is None:
        watching = []
        _call_with_loaders(trainer, watching)
    watching.append(see)

    def end() -> None:
        watching.remove(see)
        if not watching:
            strategy.__dict__.pop("process_dataloader", None)

    return end


def training_iteration(trainer: pl.Trainer) -> object | None:
    """What a fit's own iteration of its loader asks for indices, whoever else reads the same loader; None if not found.

    A validation inside an epoch, or a callback, may iterate the training loader, too.
    """
    iterator = getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_iterator", None)
    of_loaders: list[object] = getattr(iterator, "iterators", [])
    found: object | None = getattr(of_loaders[0], "_sampler_iter", None) if len(of_loaders) == 1 else None
    return found


def _call_with_loaders(trainer: pl.Trainer, watching: list[Callable[[Any], None]]) -> None:
    own = trainer.strategy.process_dataloader

    def process_dataloader(loader: object) -> object:
        loader = own(loader)
        for see in watching if trainer.training else ():
            see(loader)
        return loader

    process_dataloader.watching = watching  # type: ignore[attr-defined]
    trainer.strategy.__dict__["process_dataloader"] = process_dataloader


@contextmanager
def metrics_kept(trainer: pl.Trainer) -> Iterator[None]:
    """Give a trainer back what it has logged: each of its runs, ``predict`` too, begins with empty metrics."""
    connector = trainer._logger_connector
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    kept = {name: getattr(connector, name) for name in names}
    try:
        yield
    finally:
        for name, metrics in kept.items():
            setattr(connector, name, metrics)


@contextmanager
def at_step(trainer: pl.Trainer, step: int, epoch: int) -> Iterator[None]:
    """Let a trainer, and what it runs, say that so many steps are done and that this is the epoch.

    A loss may depend on ``global_step`` or ``current_epoch``, as where the weight of a term grows. Both are properties
    without a setter, which read the counts of the fit's loops.

    Args:
        trainer: says so as long as the context lasts.
        step: its ``global_step``, in automatic optimization and by hand.
        epoch: its ``current_epoch``.
    """
    loop = trainer.fit_loop
    automatic, by_hand = loop.epoch_loop.automatic_optimization, loop.epoch_loop.manual_optimization
    steps = [automatic.optim_progress.optimizer.step.total, by_hand.optim_step_progress.total]
    with ExitStack() as stack:
        for count, value in (*((each, step) for each in steps), (loop.epoch_progress.current, epoch)):
            stack.callback(setattr, count, "completed", count.completed)
            count.completed = value
        yield


def learns_nothing(trainer: Any) -> bool:
    """Whether an epoch of the fit has no backward passes: the one in which SWA renews the statistics of batch norm."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def launches_by_multiprocessing(trainer: Any) -> bool:
    """Whether the trainer spawns or forks its processes anew for each fit, rather than running the script in each."""
    kinds = type(trainer.strategy.launcher).__mro__  # Lightning has the class twice, once in either package
    return any(kind.__name__ == "_MultiProcessingLauncher" for kind in kinds)
