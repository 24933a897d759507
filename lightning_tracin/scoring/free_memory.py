"""How much memory is free: on this machine, and of what a container or a scheduler's job may take of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """Where a version of Linux' control groups tells of memory."""

    folder: str
    limit: str
    used: str
    reclaimable: str  # the entry of memory.stat: a part of the files' cache, which is given up when it is needed


_VERSIONS = {
    "": _Names("", "memory.max", "memory.current", "inactive_file"),
    "memory": _Names("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int | None:
    """The bytes that can be taken without swapping; None where the system does not tell.

    Linux counts what it would give up of its cache as free (``MemAvailable``); elsewhere it is the free pages. Where a
    control group of this process, or one around it, has a limit (Docker, Kubernetes, SLURM), no more than is left of
    that.
    """
    found = [*_free_in_groups(), *_free_on_machine()]
    return min(found, default=None)


def _free_on_machine() -> Iterator[int]:
    if _MEMINFO.exists():
        entries = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "MemAvailable" in entries:
            yield int(entries["MemAvailable"].split()[0]) * 1024
            return
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_groups() -> Iterator[int]:
    """What is left of each limit that this process is under."""
    if not _OWN_GROUPS.exists():
        return
    for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        names = next((_VERSIONS[each] for each in controllers.split(",") if each in _VERSIONS), None)
        if names is None:
            continue
        top = _GROUPS / names.folder
        place = top / group.lstrip("/")
        for folder in (place, *place.parents):
            if folder != top and top not in folder.parents:
                break
            yield from _left(folder, names)


def _left(folder: Path, names: _Names) -> Iterator[int]:
    """What is left of the limit of one group, if it has one."""
    try:
        limit, used, stat = (
            (folder / each).read_text(encoding="utf-8") for each in (names.limit, names.used, "memory.stat")
        )
    except OSError:  # a group without limits of memory, or the part of the tree above a container's
        return
    if limit.strip() != "max":
        entries = dict(line.split() for line in stat.splitlines())
        yield max(0, int(limit) - int(used) + int(entries.get(names.reclaimable, 0)))
