"""Which pages of a file does an epoch ask the disk for before it needs them, and let go of after use?"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCHES_EARLY = 4
"""A page is asked for at least as many batches before its first image is decoded."""
ASK_BYTES = 1 << 17
"""The kernel reads no more than this for certain, per wish (the default read_ahead_kb)."""

Pages = dict[int, list[int]]
"""Number of a batch -> pages."""


def schedule(pages: NDArray[np.int64], batch_size: int) -> tuple[Pages, Pages]:
    """(before which batch which pages are asked for, before which they are let go of).

    pages: of an epoch's images, in their order. Asked for evenly, as late as every page is still in time.
    """
    names, first = np.unique(pages, return_index=True)
    last = len(pages) - 1 - np.unique(pages[::-1], return_index=True)[1]
    used, done = first // batch_size, last // batch_size + 1
    by_use = np.argsort(used, kind="stable")
    even = np.arange(len(names)) * (-(-len(pages) // batch_size) / max(1, len(names)))
    due = np.floor(even - max(0.0, (even - used[by_use]).max(initial=0.0))).astype(np.int64) - BATCHES_EARLY
    ask, drop = defaultdict(list), defaultdict(list)
    for name, batch in zip(names[by_use].tolist(), np.maximum(due, 0).tolist(), strict=True):
        ask[batch].append(name)
    for name, batch in zip(names.tolist(), done.tolist(), strict=True):
        drop[batch].append(name)
    return dict(ask), dict(drop)


class ReadAhead:
    """The wishes of one epoch about one file, which is mapped into memory."""

    def __init__(self, path: Path, page_bytes: int, pages: NDArray[np.int64], batch_size: int) -> None:
        """pages: of the epoch's images, in their order."""
        self.page_bytes = page_bytes
        self.ask, self.drop = schedule(pages, batch_size)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def before(self, batch: int, mapping: Any) -> None:
        """Called before `batch` (0, 1, ...) is decoded. mapping: the file's mmap.mmap."""
        for page in self.ask.pop(batch, ()):
            for start in range(page * self.page_bytes, (page + 1) * self.page_bytes, ASK_BYTES):
                os.posix_fadvise(self._file, start, ASK_BYTES, os.POSIX_FADV_WILLNEED)
        for page in self.drop.pop(batch, ()):
            start = page * self.page_bytes
            mapping.madvise(mmap.MADV_DONTNEED, start, min(self.page_bytes, len(mapping) - start))
            os.posix_fadvise(self._file, start, self.page_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
