"""The processes of a fit or a query: their ranks, the values that they exchange, and errors that fail all of them.

They communicate through torch.distributed, as Lightning's strategy has initialised it. Each process stores and scores
its own shards.

Every exchange carries an error flag beside the value. An error in one process is therefore raised in all of them at
their next exchange, and none waits for a process that has left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# An error of one of these classes keeps its class in the other processes; any other becomes a RuntimeError there.
_ERRORS = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, OSError, BlockingIOError, FileExistsError, FileNotFoundError)
}

# How long a shared file system may take to show one node the files that another node wrote.
_VISIBILITY_SECONDS = 60.0

_SHARED_MARK = "lightning_tracin_shared"  # attribute of an error that must not be sent to other processes


@dataclass(frozen=True)
class Processes:
    """The processes that work together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process of rank 0, which writes the files that all processes share."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """All-gather: the values of all processes in the order of the ranks. Every process must call it.

        Args:
            value: any object that can be pickled; tensors must be on the CPU.

        Raises:
            Exception: the error of another process, if one failed before it sent its value.
        """
        return [value] if self.size == 1 else self._exchange(None, value)

    def wait(self) -> None:
        """A barrier: block until every process has called it."""
        self.gather(None)

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """End a block of code in all processes together: when all have finished it, or with the error of one.

        Blocks may be nested, and may call :meth:`gather`.

        Raises:
            Exception: the error of this process, or else that of another.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and not _is_shared(error):
                mark_shared(error)
                with suppress(Exception):  # the exchange fails if others failed too; this process raises its own error
                    self._exchange((type(error).__name__, str(error)), None)
            raise
        self.wait()

    def require_same(self, what: str, value: Any) -> None:
        """Check that all processes have the same value.

        Args:
            what: the value's name, for the message.
            value: the value of this process.

        Raises:
            ValueError: if a process has another value than the first one.
        """
        values = self.gather(value)
        differing = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if differing is not None:
            raise mark_shared(
                ValueError(
                    f"Processes 0 and {differing} have different {what}. Let each of them load the same examples in "
                    "the same order: call seed_everything before anything that splits or shuffles them at random."
                )
            )

    def share(self, number: int) -> range:
        """This process's contiguous share of ``range(number)``, by rank; the shares' sizes differ by one at most."""
        return range(*(-(-number * rank // self.size) for rank in (self.rank, self.rank + 1)))

    def _exchange(self, error: tuple[str, str] | None, value: Any) -> list[Any]:
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, (error, value))
        for rank, (remote_error, _) in enumerate(messages):
            if remote_error is not None:
                name, text = remote_error
                text = text if name in _ERRORS else f"{name}: {text}"
                raise mark_shared(_ERRORS.get(name, RuntimeError)(f"{text} (In process {rank} of {self.size}.)"))
        return [value for _, value in messages]


#: The only process of a fit or a query without a distributed strategy.
ALONE = Processes()


def mark_shared(error: Exception) -> Exception:
    """Mark an error that must not be sent to the other processes: all raise it, or none waits for an exchange."""
    error.__dict__[_SHARED_MARK] = True
    return error


def wait_until_visible(is_visible: Callable[[], bool], what: str) -> None:
    """Wait until this process sees the files that another process wrote to a shared folder.

    Args:
        is_visible: whether the files are there.
        what: a clause for the message: who has written which files.

    Raises:
        FileNotFoundError: if they are not visible within a minute.
    """
    stop = time.monotonic() + _VISIBILITY_SECONDS
    while not is_visible():
        if time.monotonic() > stop:
            raise FileNotFoundError(
                f"{what}, but this one does not see it. All processes need the same folder: pass a dirpath on a file "
                "system that all nodes share."
            )
        time.sleep(0.1)


def _is_shared(error: Exception) -> bool:
    return _SHARED_MARK in error.__dict__
