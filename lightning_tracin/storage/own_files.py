"""What the files of a trace are called, so that nothing else is ever removed, replaced or written through."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lightning_tracin.gradients.printable import enumerated
from lightning_tracin.gradients.sites import KEY_PATTERN
from lightning_tracin.storage.files import PARTIAL, write_json
from lightning_tracin.storage.schemas import FORMAT, HeaderOfAnyVersion, header_of_any_version

HEADER = "trace.json"

# Those of format version 1 can be replaced, too.
_KEY = rf"({KEY_PATTERN}|texts|tracin-we|tracin-last)"
_UNIQUE = r"\.[0-9a-f]{8}\.partial"
_TEMPORARY = rf"({_UNIQUE})?"
# What safetensors itself writes to before it renames the file; a process that is killed leaves it.
_OF_SAFETENSORS = r"\.tmp\w+"
_SHARDS = rf"((index\.json|(\d{{5}}|components)\.safetensors){_TEMPORARY}|{_OF_SAFETENSORS})"
_STEP = r"checkpoints/step-\d{9}(\.partial)?"
_OWN = re.compile(
    rf"(trace|vocabulary)\.json{_TEMPORARY}"
    rf"|texts(\.partial)?/{_SHARDS}"
    r"|frozen-[0-9a-f]{32}\.safetensors"
    rf"|{_STEP}/((checkpoint\.json|(weights|frozen|drawn)\.safetensors|second-moments-{_KEY}\.safetensors){_TEMPORARY}"
    rf"|{_OF_SAFETENSORS})"
    rf"|{_STEP}/{_KEY}(\.partial)?/{_SHARDS}"
    rf"|running\.partial/process-\d+/({_KEY}/)?\d{{5}}/({_KEY}\.safetensors{_TEMPORARY}|{_OF_SAFETENSORS})"
)
# Folders that a trace has for itself; of `checkpoints`, which others use too, only what is called as its own.
_PLACES = re.compile(rf"(texts(\.partial)?|running\.partial|{_STEP})(/.*)?")
# What is left of a trace if its process is killed while it writes its first file: in nobody's way.
_FIRST = re.compile(rf"trace\.json{_UNIQUE}")
_TOP = ("texts", "texts.partial", "checkpoints", "running.partial")


def has_trace(folder: Path) -> bool:
    """Whether the header of a trace is in a folder, of whatever version."""
    header = _header(folder)
    return header is not None and not header.removed


def in_the_way(folder: Path) -> list[Path]:
    """What a trace in a folder would write over, or into, and did not write itself: files of others, and links."""
    owned = _header(folder) is not None
    found = []
    for path, name in _entries(folder):
        is_own = _OWN.fullmatch(name) is not None
        is_in_place = _PLACES.fullmatch(name) is not None or is_own
        if not owned and _FIRST.fullmatch(name) and path.is_file() and not path.is_symlink():
            continue
        if path.is_symlink():
            if is_in_place or name in _TOP or "/" in name:
                found.append(path)
        elif not path.is_dir() and is_in_place and not (is_own and owned):
            found.append(path)
    return found


def require_free(folder: Path) -> None:
    """Check that nothing is in the way of a trace in a folder but one that is there already.

    Raises:
        FileExistsError: if something is; the message names it.
    """
    found = in_the_way(folder)
    if found:
        raise FileExistsError(
            f"{folder.absolute()} holds {_listed(folder, found)}, which no trace wrote but a trace would write over. "
            "Pass another dirpath, or move them away: only what a trace wrote is ever replaced."
        )


def require_own(folder: Path) -> None:
    """Check that a trace in a folder can be written on: no link is in the way, and temporary folders are its own.

    Files of others that lie in complete folders stay where they are.

    Raises:
        FileExistsError: if it cannot; the message names what is in the way.
    """
    found = in_the_way(folder)
    links = [path for path in found if path.is_symlink()]
    if links:
        raise FileExistsError(
            f"{folder.absolute()} holds {_listed(folder, links)}, a link, through which a trace would write elsewhere. "
            "Remove the link, or put what it leads to into its place."
        )
    temporary = [path for path in found if f"{PARTIAL}/" in path.relative_to(folder).as_posix()]
    if temporary:
        raise FileExistsError(
            f"{folder.absolute()} holds {_listed(folder, temporary)}, which no trace wrote, in a temporary folder, "
            "which a trace would remove. Move it away."
        )


def require_only_own(folder: Path, parts: Sequence[Path]) -> None:
    """Check that some folders of a trace, which are to be removed, hold nothing of others.

    Raises:
        FileExistsError: if they do; the message names it.
    """
    found = [path for path in in_the_way(folder) if any(part in path.parents for part in parts)]
    if found:
        raise FileExistsError(
            f"{folder.absolute()} holds {_listed(folder, found)}, which no trace wrote, in a checkpoint that this fit "
            "would replace. Move it away."
        )


def _listed(folder: Path, paths: Sequence[Path]) -> str:
    return enumerated([path.relative_to(folder).as_posix() for path in paths], 3)


def own_temporary(folder: Path) -> list[Path]:
    """A trace's own temporary files and folders, which a write that was broken off has left behind."""
    temporary = ((path, name) for path, name in _entries(folder) if path.suffix == PARTIAL)
    return sorted(path for path, name in temporary if _OWN.fullmatch(name) or _PLACES.fullmatch(name))


def remove_temporary(folder: Path, *, within_fit: bool = False) -> None:
    """Remove what :func:`own_temporary` finds; no other process may be writing now.

    Args:
        folder: the trace's.
        within_fit: whether a fit of this process may be: its folders stay, and what is in them.
    """
    for path in own_temporary(folder):
        if within_fit and (path.is_dir() or path.parent != folder):
            continue
        if path.is_dir():
            _remove(folder, below=path.relative_to(folder).as_posix() + "/")
        else:
            path.unlink(missing_ok=True)


def remove_trace(folder: Path) -> None:
    """Remove a trace's own files from a folder, and nothing else; folders that others keep files in stay.

    The header first says that the trace is being removed, so that nobody reads what is left of it, and goes last, so
    that a removal that is broken off can be taken up again.
    """
    if _header(folder) is None:
        return
    mark_removed(folder)
    _remove(folder, keep=HEADER)
    (folder / HEADER).unlink(missing_ok=True)


def mark_removed(folder: Path) -> None:
    """Say in a folder's header that what is there is no trace, though it is a trace's own."""
    write_json(folder / HEADER, {"format": FORMAT, "removed": True})


def remove_folder(trace: Path, folder: Path) -> None:
    """Remove one of a trace's folders, with its own files.

    It is renamed first: what is left of it, if this is broken off, is never read, and in nobody's way.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    below = partial.relative_to(trace).as_posix() + "/"
    _remove(trace, below=below)
    folder.replace(partial)
    _remove(trace, below=below)


def copy_before(source: Path, target: Path, step: int) -> None:
    """Copy what a trace had up to a step into an empty folder: by hard links where that is possible.

    Files of a trace are replaced, never changed, so that neither trace sees what happens to the other. The header is
    left to the caller.
    """
    for path, name in sorted(_entries(source), key=lambda entry: entry[1]):
        if path.is_dir() or path.is_symlink() or _OWN.fullmatch(name) is None or ".partial" in name or name == HEADER:
            continue
        checkpoint = re.match(r"checkpoints/step-(\d{9})/", name)
        if checkpoint is not None and int(checkpoint[1]) > step:
            continue
        copied = target / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copied)
        except OSError:  # another file system, or one without links
            shutil.copy2(path, copied)


def _remove(folder: Path, *, below: str = "", keep: str = "") -> None:
    folders = []
    for path, name in _entries(folder):
        if path.is_dir() and not path.is_symlink():
            folders.append((path, name))
        elif not path.is_symlink() and name.startswith(below) and name != keep and _OWN.fullmatch(name):
            path.unlink(missing_ok=True)
    for path, name in sorted(folders, key=lambda entry: -entry[1].count("/")):
        if f"{name}/".startswith(below):
            with suppress(OSError):  # others keep files in it
                path.rmdir()


def _entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files, links and folders at a trace's places, and their names inside of the folder; links are not followed."""
    for top in (HEADER, "vocabulary.json", *_TOP):
        if os.path.lexists(folder / top):
            yield folder / top, top
    for pattern in ("*.partial", "frozen-*"):
        for path in folder.glob(pattern) if folder.is_dir() else ():
            if path.name not in _TOP and _OWN.fullmatch(path.name):
                yield path, path.name
    for top in _TOP:
        if (folder / top).is_symlink():
            continue
        for parent, directories, files in os.walk(folder / top, followlinks=False):
            for each in (*directories, *files):
                path = Path(parent) / each
                yield path, path.relative_to(folder).as_posix()


def _header(folder: Path) -> HeaderOfAnyVersion | None:
    """A folder's header, if it is that of a trace, of whatever version; its checksum is not verified."""
    path = folder / HEADER
    if path.is_symlink():
        return None
    try:
        header = header_of_any_version(path)
    except (OSError, ValueError):
        return None
    return header if header.format == FORMAT else None
