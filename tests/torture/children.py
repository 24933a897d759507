"""Children of a process that has everything imported: each acts in a fork, and may be killed there.

The process must have one thread, as a fork has no other. A child that is to be killed dies by SIGKILL at a moment, or
just before its n-th operation on files; or by SIGXFSZ, in the middle of writing a file that would become too long.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What Python tells of changes to files. What safetensors does in Rust lies between two of them.
_CHANGES = {
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "shutil.copyfile",
}
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NEVER = sys.maxsize


@dataclass(frozen=True)
class Aim:
    """When a child is killed.

    Attributes:
        seconds: after its start; None for not by the clock.
        operation: before its n-th operation on files, counted from 1.
        length: if given, it is not killed at that operation, but when a file becomes longer than that from then on.
    """

    seconds: float | None = None
    operation: int = NEVER
    length: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        killed: whether by a signal.
        hung: whether that was because it took too long.
        value: what it returned.
        error: what it raised: class, message and where.
        operations: how many operations on files it began, if it was not killed.
    """

    killed: bool = False
    hung: bool = False
    value: Any = None
    error: tuple[str, str, str] | None = None
    operations: int = 0


def in_child(act: Callable[[], Any], told: Path, aim: Aim | None = None, *, seconds: float = 60.0) -> Ended:
    """Act in a fork of this process, with nothing printed.

    Args:
        act: what it does; what it returns must be picklable.
        told: a file for what it has to tell, which is not counted.
        aim: when it is killed.
        seconds: after which it is taken to hang.
    """
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be_child(act, told, aim or Aim())
    limit = seconds if aim is None or aim.seconds is None else aim.seconds
    status = _wait(child, time.monotonic() + limit)
    late = status is None
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) or not told.exists():
        return Ended(killed=True, hung=late and limit == seconds)
    value, error, operations = pickle.loads(told.read_bytes())
    return Ended(value=value, error=error, operations=operations)


def _wait(child: int, until: float) -> int | None:
    """The status of a child that ends in time."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def _be_child(act: Callable[[], Any], told: Path, aim: Aim) -> None:
    """Never returns."""
    value = error = None
    operations = 0
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        count = _count_operations(aim)
        try:
            value = act()
        except BaseException as raised:  # told to the parent
            error = type(raised).__name__, str(raised), "".join(traceback.format_exception(raised)[-3:])
        operations = count()
        told.write_bytes(pickle.dumps((value, error, operations)))
    finally:
        os._exit(0)


def _count_operations(aim: Aim) -> Callable[[], int]:
    """Count operations from now on, and die as aimed; what is returned ends that, and says how many there were."""
    n_begun, counting = 0, True
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would raise an error
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def begin() -> None:
        nonlocal n_begun
        n_begun += 1
        if n_begun != aim.operation:
            return
        if aim.length is None:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # another thread may run on for a moment
        resource.setrlimit(resource.RLIMIT_FSIZE, (aim.length, resource.RLIM_INFINITY))

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if not counting:
            return
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _FOR_WRITING):
            begin()

    def end() -> int:
        nonlocal counting
        counting = False
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return n_begun

    synchronize = os.fsync

    def fsync(descriptor: int) -> None:
        if counting:
            begin()
        synchronize(descriptor)

    os.fsync = fsync
    sys.addaudithook(hear)
    return end
