"""The lock on a trace: one fit (until it ends) or one query (while it stores gradients) writes at a time.

Reading needs no lock, because complete files do not change.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_warn

_NAME = ".lightning_tracin.lock"

#: The errors of file systems without locks, such as Lustre without its option flock, or NFS without lockd.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def locked(folder: Path, *, within_fit: bool = False) -> Iterator[None]:
    """Hold the lock on a trace's folder; of several processes, the first one takes it for all.

    The lock is on the file ``.lightning_tracin.lock``, which exists as long as it is held. If the process is killed the
    file remains, but the operating system releases the lock. On a file system without locks there is a warning and no
    lock: a marker file in its place would outlive a killed process, and block its fit when that is resumed on another
    node.

    Args:
        folder: the trace's folder; it is created if missing, and removed again if nothing is written to it.
        within_fit: whether this may run inside of a fit in this process that already holds the lock.

    Raises:
        BlockingIOError: if another fit or query holds the lock.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mode = folder.stat().st_mode & 0o666  # whoever may write into the folder may lock it
    lock = FileLock(folder / _NAME, timeout=0, mode=mode, is_singleton=True, fallback_to_soft=False)
    try:
        if lock.is_locked and not within_fit:
            raise Timeout(lock.lock_file)
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"Another fit or query writes into the trace in {folder.absolute()} now, which one alone may do. Fit into "
            "another dirpath, or wait until the other is done and try again; complete traces can be read meanwhile."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        rank_zero_warn(
            f"The file system of {folder.absolute()} cannot lock files ({error}): take care that no other fit or query "
            "writes into that folder meanwhile."
        )
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.lock_counter <= 1:  # filelock retries if another process removes the file that it waits for
                (folder / _NAME).unlink()
            if is_new and not any(folder.iterdir()):  # a fit that was refused leaves no folder
                folder.rmdir()
        lock.release()  # does nothing if the lock was not acquired
