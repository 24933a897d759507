"""The strategy of a trainer: which processes it has, and whether a trace can be made or asked with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning_tracin.bridge.compat import launches_by_multiprocessing
from lightning_tracin.parallel.processes import ALONE, Processes

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Strategies that leave the module whole on every device, and the one whose way to spread it out is known.
_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")

_SPREADING = "FSDPStrategy"


def processes_of(trainer: pl.Trainer) -> Processes:
    """The processes of a trainer; one, where they have not been launched (yet)."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(trainer.global_rank, trainer.world_size)


def launched(trainer: pl.Trainer) -> Processes:
    """The processes of a trainer, which are started and connected now if no fit has done so, as ``predict`` would.

    A trainer that spawns or forks its processes has this one alone.

    Raises:
        ValueError: if they cannot work on a trace.
    """
    require_strategy(trainer)
    if trainer.world_size > 1 and processes_of(trainer).size == 1 and not launches_by_multiprocessing(trainer):
        launcher: Any = trainer.strategy.launcher
        launcher.launch(trainer.strategy.setup_environment)
    return processes_of(trainer)


def require_strategy(trainer: pl.Trainer) -> None:
    """Check that the trainer's strategy leaves the module whole, or spreads it out as FSDP does.

    Raises:
        ValueError: if it does neither.
    """
    strategy: Any = trainer.strategy
    if trainer.world_size > 1 and not _is_of(strategy, *_WHOLE, _SPREADING):
        raise ValueError(
            "lightning_tracin works with one device, DDP and FSDP, but the trainer's strategy is "
            f"{type(strategy).__name__}, which spreads the weights over the devices in another way. Use "
            'strategy="ddp" or "fsdp", or fit without TracInCallback.'
        )
    if spreads(trainer) and not strategy.kwargs.get("use_orig_params"):
        raise ValueError(
            "With use_orig_params=False, FSDP hides which parameters the optimizer's groups hold, so that learning "
            "rates cannot be told. Leave it at Lightning's default, FSDPStrategy(use_orig_params=True)."
        )


def spreads(trainer: pl.Trainer) -> bool:
    """Whether the trainer's strategy spreads the weights over the devices as FSDP does."""
    return _is_of(trainer.strategy, _SPREADING)


def _is_of(thing: object, *names: str) -> bool:
    """Whether a thing is of a class of one of the names: Lightning has each class twice, once in either package."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def require_results(trainer: pl.Trainer) -> None:
    """Check that what the trainer's processes compute comes back to this one.

    Raises:
        ValueError: if they are spawned or forked for each call.
    """
    if launches_by_multiprocessing(trainer):
        raise ValueError(
            "The trainer spawns or forks its processes, which end before their results could come back. Ask for "
            'influence with strategy="ddp", or with devices=1 and trace="..." (the folder that the fit wrote).'
        )
