"""The processes of a fit or a query: which of them this is, and what all of them know.

The engine is torch.distributed, as Lightning's strategy has set it up. Each process stores and scores its own shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

# Strategies that leave the module whole on every device. Others spread it out, so that no device has whole layers.
_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")


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
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def share(self, number: int) -> range:
        """This process's run of ``number`` things: runs are in the order of the ranks, and differ by one at most."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)


ALONE = Processes()


def processes_of(trainer: pl.Trainer) -> Processes:
    """The processes of a trainer; one, where they have not been launched (yet)."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(trainer.global_rank, trainer.world_size)


def require_whole_module(trainer: pl.Trainer) -> None:
    """Check that the trainer's strategy leaves the module whole.

    Raises:
        ValueError: if it shards it.
    """
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if trainer.world_size > 1 and not any(kind in _WHOLE for kind in kinds):
        raise ValueError(
            f"lightning_tracin works with one device and with DDP, but the trainer's strategy is {kinds[0]}, which "
            'spreads the weights over the devices. Use strategy="ddp", or fit without TracInCallback.'
        )


def require_results(trainer: pl.Trainer) -> None:
    """Check that what the trainer's processes compute comes back to this one.

    Raises:
        ValueError: if they are spawned or forked for each call.
    """
    launcher = trainer.strategy.launcher
    if any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(launcher).__mro__):
        raise ValueError(
            "The trainer spawns or forks its processes, which end before their results could come back. Ask for "
            'influence with strategy="ddp", or with devices=1 and trace="..." (the folder that the fit wrote).'
        )
