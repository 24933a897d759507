"""The processes of a fit or a query: which of them this is, and what all of them know.

The engine is torch.distributed, as Lightning's strategy has set it up. Each process stores and scores its own shards.

Whatever processes tell each other, they tell along with it whether they have failed. So an error in one of them ends
all of them with that error, and none waits for one that has left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    import pytorch_lightning as pl

# Strategies that leave the module whole on every device, and the one whose way to spread it out is known.
_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
_SHARDING = "FSDPStrategy"

# What an error is raised as where it comes from another process; any other is a RuntimeError.
_ERRORS = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, OSError, BlockingIOError, FileExistsError, FileNotFoundError)
}

_SECONDS = 60.0  # that a shared file system may take to show one node what another has written


@dataclass(frozen=True)
class Processes:
    """The processes that work together.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on each of them; every process must call it.

        Args:
            value: anything that can be sent; tensors on the CPU.

        Raises:
            Exception: as another process did, which then has not come to send a value.
        """
        return [value] if self.size == 1 else self._exchange(None, value)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave a block of code when all processes are through, or with an error if any of them has failed.

        Blocks may be nested, and may gather.

        Raises:
            Exception: what this process raised; else the same as another process did.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and not _is_told(error):
                leave(error)
                with suppress(Exception):  # others have failed too, or are gone: what is raised here counts
                    self._exchange((type(error).__name__, str(error)), None)
            raise
        self.wait()

    def require_same(self, what: str, value: Any) -> None:
        """Check that all processes have come upon the same.

        Raises:
            ValueError: if they have not.
        """
        found = self.gather(value)
        differing = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if differing is not None:
            raise leave(
                ValueError(
                    f"Processes 0 and {differing} have different {what}. Let each of them load the same examples in "
                    "the same order: call seed_everything before anything that splits or shuffles them at random."
                )
            )

    def share(self, number: int) -> range:
        """This process's run of ``number`` things: runs are in the order of the ranks, and differ by one at most."""
        return range(*(-(-number * rank // self.size) for rank in (self.rank, self.rank + 1)))

    def _exchange(self, error: tuple[str, str] | None, value: Any) -> list[Any]:
        sent: list[Any] = [None] * self.size
        dist.all_gather_object(sent, (error, value))
        for rank, (failed, _) in enumerate(sent):
            if failed is not None:
                name, text = failed
                text = text if name in _ERRORS else f"{name}: {text}"
                raise leave(_ERRORS.get(name, RuntimeError)(f"{text} (In process {rank} of {self.size}.)"))
        return [value for _, value in sent]


ALONE = Processes()


def leave(error: Exception) -> Exception:
    """Mark an error that the other processes must not be told: they know it, or are where they do not listen."""
    error.__dict__["lightning_tracin_told"] = True
    return error


def _is_told(error: Exception) -> bool:
    return "lightning_tracin_told" in error.__dict__


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
    if trainer.world_size > 1 and processes_of(trainer).size == 1 and not _spawns(trainer):
        launcher: Any = trainer.strategy.launcher
        launcher.launch(trainer.strategy.setup_environment)
    return processes_of(trainer)


def require_strategy(trainer: pl.Trainer) -> None:
    """Check that the trainer's strategy leaves the module whole, or spreads it out as FSDP does.

    Raises:
        ValueError: if it does neither.
    """
    strategy: Any = trainer.strategy
    if trainer.world_size > 1 and not _is_of(strategy, *_WHOLE, _SHARDING):
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
    return _is_of(trainer.strategy, _SHARDING)


def _is_of(thing: object, *names: str) -> bool:
    """Whether a thing is of a class of one of the names: Lightning has each class twice, once in either package."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def require_results(trainer: pl.Trainer) -> None:
    """Check that what the trainer's processes compute comes back to this one.

    Raises:
        ValueError: if they are spawned or forked for each call.
    """
    if _spawns(trainer):
        raise ValueError(
            "The trainer spawns or forks its processes, which end before their results could come back. Ask for "
            'influence with strategy="ddp", or with devices=1 and trace="..." (the folder that the fit wrote).'
        )


def _spawns(trainer: pl.Trainer) -> bool:
    return _is_of(trainer.strategy.launcher, "_MultiProcessingLauncher")


def await_seen(seen: Callable[[], bool], what: str) -> None:
    """Wait until this process sees, in a shared folder, what another has written.

    Raises:
        FileNotFoundError: if it does not within a minute.
    """
    stop = time.monotonic() + _SECONDS
    while not seen():
        if time.monotonic() > stop:
            raise FileNotFoundError(
                f"{what}, but this one does not see it. All processes need the same folder: pass a dirpath on a file "
                "system that all nodes share."
            )
        time.sleep(0.1)
