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
from typing import Any

import torch.distributed as dist

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
    def synchronized(self) -> Iterator[None]:
        """Leave a block of code when all processes are through, or with an error if any of them has failed.

        Blocks may be nested, and may gather.

        Raises:
            Exception: what this process raised; else the same as another process did.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and not _is_told(error):
                mark_told(error)
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
            raise mark_told(
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
                raise mark_told(_ERRORS.get(name, RuntimeError)(f"{text} (In process {rank} of {self.size}.)"))
        return [value for _, value in sent]


ALONE = Processes()


def mark_told(error: Exception) -> Exception:
    """Mark an error that the other processes must not be told: they know it, or are where they do not listen."""
    error.__dict__["lightning_tracin_told"] = True
    return error


def _is_told(error: Exception) -> bool:
    return "lightning_tracin_told" in error.__dict__


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
