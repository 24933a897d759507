"""A trace is written by one at a time: by a fit until it ends, or by a query while it stores gradients.

Reading needs no lock: what is complete does not change.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_warn

_NAME = ".lightning_tracin.lock"

# What systems answer whose files cannot be locked, such as Lustre without its option flock, or NFS without lockd.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def locked(folder: Path, *, within_fit: bool = False) -> Iterator[None]:
    """Be the only one that writes into a trace's folder; the first of several processes does this for all.

    The lock is on the file ``.lightning_tracin.lock``, which is there meanwhile. A process that is killed leaves the
    file, but the operating system frees the lock. Where files cannot be locked there is a warning, and no lock: a mark
    in its place would outlive a killed process, and stand in the way when its fit is resumed on another node.

    Args:
        folder: of the trace; it is made if there is none, and removed if nothing is written to it.
        within_fit: whether the fit that this thread is in, which has the lock, lets this in.

    Raises:
        BlockingIOError: if another fit or query has the lock.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mode = folder.stat().st_mode & 0o666  # who may write into the folder may lock it
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
        if error.errno not in _NO_LOCKS:
            raise
        rank_zero_warn(
            f"The file system of {folder.absolute()} cannot lock files ({error}): take care that no other fit or query "
            "writes into that folder meanwhile."
        )
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.lock_counter <= 1:  # filelock asks again where the file that it waited for is gone
                (folder / _NAME).unlink()
            if made and not any(folder.iterdir()):  # a refused fit leaves nothing
                folder.rmdir()
        lock.release()  # nothing, if it is not held
