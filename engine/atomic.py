"""How is one file replaced so that a kill at any moment leaves the old content or the new one, never half of it?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; on leaving it is synced to disk and renamed to `path`.

    After an exception `path` is as before and the hidden file is gone; after a kill the next call overwrites it.
    One process at a time may replace a path.
    """
    writing = path.with_name(f".{path.name}.writing")
    try:
        yield writing
        sync(writing)
        writing.replace(path)
        sync(path.parent)  # the rename itself is on disk only when the folder is
    finally:
        writing.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
