"""How is a file, or a folder, replaced so that a kill at any moment leaves the old content or the new one, never half;
and how is a file read, whatever lies under its name?"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

WRITING, EARLIER = "writing", "earlier"
"""Ends of the hidden names of what is written and of what it replaces."""
EXCHANGE, HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux."""


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """A hidden path beside `path` to write to; on leaving it is synced to disk and renamed to `path`.

    After an exception `path` is as before and the hidden file is gone; after a kill the next call overwrites it.
    One process at a time may replace a path with the same mark.
    """
    writing = path.with_name(f".{path.name}{mark}.{WRITING}")
    try:
        yield writing
        sync(writing)
        writing.replace(path)
        sync(path.parent)  # the rename itself is on disk only when the folder is
    finally:
        writing.unlink(missing_ok=True)


def replace_files(folder: Path, contents: Mapping[str, bytes], mark: str = "") -> None:
    """Write files of `folder`, by name, of which the last says that all are there: a kill at any moment leaves all
    earlier ones, all new ones, or no last one. What lies beside them stays.

    All are on disk before the first is replaced, so a full disk leaves the earlier ones. mark: see `replacing`.
    """
    *_, last = contents
    with ExitStack() as renames:  # from the innermost out, so the last file's first
        for name, content in reversed([*contents.items()]):
            writing = renames.enter_context(replacing(folder / name, mark))
            writing.write_bytes(content)
            sync(writing)
        (folder / last).unlink(missing_ok=True)
        sync(folder)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new hidden folder beside `folder` to write to; on leaving it is synced to disk and takes the place of `folder`,
    with all that lies in that, in one step.

    After an exception `folder` is as before and the hidden one is gone; after a kill the next call removes that. Where
    the file system cannot exchange folders (NFS) it takes two steps: a kill between them leaves no folder, and the
    next call puts the earlier one back first. One process at a time may replace a folder.
    """
    folder = Path(os.path.realpath(folder))
    writing, earlier = (folder.with_name(f".{folder.name}.{what}") for what in (WRITING, EARLIER))
    _clear(folder, writing, earlier)
    writing.mkdir(parents=True)
    try:
        yield writing
        for path in (*sorted(writing.rglob("*")), writing):
            sync(path)
        if not folder.exists():
            writing.rename(folder)
        elif not _exchange(writing, folder):
            folder.rename(earlier)
            writing.rename(folder)
        sync(folder.parent)
    finally:
        _clear(folder, writing, earlier)


def _clear(folder: Path, writing: Path, earlier: Path) -> None:
    """Put the earlier folder back where there is no other, and remove what else is left."""
    if earlier.is_dir() and not folder.exists():
        earlier.rename(folder)
    for left in (writing, earlier):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names in one step; whether the file system can."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if exchange(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on disk, as far as the file system can promise that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def sync_handle(handle: int) -> None:
    """`sync` of an open file."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot sync this kind of file
            raise


def require_file(path: Path) -> None:
    """Raise OSError where something lies at `path` that is no file: a folder, or a pipe or device, which one would read
    for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is {_kind(mode)}, not a file", str(path))


def read_small(path: Path, largest: int = 1 << 26) -> bytes:
    """The content of a file of at most `largest` bytes. Raises OSError for a larger one, and for what is no file (a
    folder, a pipe, a device), which it does not wait for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"is {_kind(status.st_mode)}, not a file", str(path))
        if status.st_size > largest:
            raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, more than {largest:,}", str(path))
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(largest)
    finally:
        os.close(handle)


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
