"""What of a .beton is written already: a list beside it of the samples on each page that the disk has.

Writing that is interrupted goes on from it. A sample is known by its key, so that others may come, go or be replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostmask.data_pipelines.beton import FORMAT
from ghostmask.engine.atomic import replacing

RECORD = np.dtype(
    [
        ("key", "<u8", (2,)), ("content", "<u8", (2,)), ("pointer", "<u8"), ("size", "<u8"), ("label", "<i8"),
        ("height", "<u2"), ("width", "<u2"), ("jpeg", "<u2"), ("check", "<u4"),
    ]
)  # fmt: skip
"""A sample: its key, a digest of it, where its data lie in the file, and what FFCV must know of them."""
Records = NDArray[np.void]


class Journal:
    """The samples of one partial file. A line that says how that file is laid out, then records."""

    def __init__(self, path: Path, layout: dict[str, int]) -> None:
        self.path = path
        self._head = json.dumps({"format": FORMAT, **layout}).encode() + b"\n"

    def read(self, partial: Path) -> Records:
        """Those that are whole, and in the partial file; none where the layout, or beton.FORMAT, is another."""
        try:
            content, size = self.path.read_bytes(), partial.stat().st_size
        except OSError:
            return np.empty(0, RECORD)
        if not content.startswith(self._head):
            return np.empty(0, RECORD)
        body = content[len(self._head) :]
        found = np.frombuffer(body[: len(body) // RECORD.itemsize * RECORD.itemsize], RECORD)
        whole = [record["check"] == _check(record) for record in found]
        kept: Records = found[np.array(whole, dtype=bool) & (found["pointer"] + found["size"] <= size)]
        return kept

    def start(self, records: Records) -> None:
        """A journal with these records in the place of the one that was there."""
        with replacing(self.path) as writing:
            writing.write_bytes(self._head + records.tobytes())

    def append(self, records: Records) -> None:
        """The samples of a page that is on disk."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(records.tobytes())

    def remove(self) -> None:
        """It is not needed any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def sealed(records: list[tuple[Any, ...]]) -> Records:
    """Records of (key, content, pointer, size, label, height, width, jpeg), with their checks."""
    table = np.array([(*record, 0) for record in records], dtype=RECORD)
    for record in table:
        record["check"] = _check(record)
    return table


def words(digest: bytes) -> tuple[int, int]:
    """16 bytes as the two numbers of a record."""
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def rows_of(keys: NDArray[np.uint64], records: Records) -> NDArray[np.int64]:
    """(n,) for each key (n, 2) the record that has it, or -1."""
    if not len(records):
        return np.full(len(keys), -1)
    pair = np.dtype([("a", "<u8"), ("b", "<u8")])
    wanted = np.ascontiguousarray(keys).view(pair).reshape(-1)
    known = np.ascontiguousarray(records["key"]).view(pair).reshape(-1)
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    return np.where(known[order[place]] == wanted, order[place], -1)


def _check(record: Any) -> int:
    return zlib.crc32(record.tobytes()[: -RECORD["check"].itemsize])
