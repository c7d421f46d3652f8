"""Where do the images of a split lie: files in folders, or stretches of tar files, kept in a few flat arrays.

A list of a million paths would be copied into every process that reads: Python objects count their users in place.
"""

from __future__ import annotations

import errno
import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError

LARGEST_FILE = 1 << 30
OWN_FILE = -1
"""Container of an image that is a file by itself."""


class Place(NamedTuple):
    """One image: its name below the root (in a tar file: the member's), its label, and what tells it from another."""

    name: str
    label: int
    container: int
    offset: int
    size: int
    changed: int
    """Time of the file's last change (of its container's), in ns."""


@dataclass(frozen=True)
class Places:
    """The images of a split, in their order."""

    root: Path
    containers: tuple[Path, ...]
    """Tar files."""
    names: bytes
    ends: NDArray[np.int64]
    """(n,) where each name ends in `names`."""
    numbers: NDArray[np.int64]
    """(n, 5): label, container, offset, size, changed."""

    @classmethod
    def of(cls, root: Path, containers: Iterable[Path], places: Iterable[Place]) -> Places:
        """From a stream of places."""
        names, ends, numbers = bytearray(), array("q"), array("q")
        for place in places:
            names += os.fsencode(place.name)
            ends.append(len(names))
            numbers.extend(place[1:])
        table = np.array(numbers, dtype=np.int64).reshape(-1, 5)
        return cls(root, tuple(containers), bytes(names), np.array(ends, dtype=np.int64), table)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) in [0, classes)."""
        return self.numbers[:, 0]

    def take(self, indices: NDArray[np.int64]) -> Places:
        """Those of the indices, in that order."""
        names = [self._bytes(int(i)) for i in indices]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return replace(self, names=b"".join(names), ends=ends, numbers=self.numbers[indices])

    def name(self, index: int) -> str:
        """What a message calls the image: its path; in a tar file, that file's path and the member's name."""
        own = os.fsdecode(self._bytes(index))
        container = int(self.numbers[index, 1])
        return str(self.root / own) if container == OWN_FILE else f"{self.containers[container]}: {own}"

    def key(self, index: int) -> bytes:
        """16 bytes that are others when name, label, size, time or place in the tar file are."""
        label, container, offset, size, changed = (int(number) for number in self.numbers[index])
        within = "" if container == OWN_FILE else self.containers[container].name
        text = f"{label} {offset} {size} {changed} {within}\0".encode("utf-8", "surrogateescape") + self._bytes(index)
        return hashlib.blake2b(text, digest_size=16).digest()

    def read(self, index: int) -> bytes:
        """The file's content. Raises OSError where it cannot be read, or is no file, and InputError where its tar file
        is another than the places are of: other bytes may be there, of another class."""
        _, container, offset, size, changed = (int(number) for number in self.numbers[index])
        if container == OWN_FILE:
            return read_small(self.root / os.fsdecode(self._bytes(index)), LARGEST_FILE)
        if size > LARGEST_FILE:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {LARGEST_FILE:,}")
        with open(self.containers[container], "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_mtime_ns != changed:
                fix = "has changed while images of it were written; do it again"
                raise InputError(f"data.root: {self.containers[container]} {fix}")
            return os.pread(file.fileno(), size, offset)

    def fingerprint(self) -> str:
        """Of all keys in their order."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.key(index))
        return digest.hexdigest()

    def _bytes(self, index: int) -> bytes:
        return self.names[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]


def shuffled(places: Places) -> Places:
    """In an order that hashes of label and file name decide: images that come or go move no others, and it is the same
    order for images in folders as in tar files."""
    own = (f"{label}\0".encode() + places._bytes(i).rpartition(b"/")[2] for i, label in enumerate(places.labels))
    return places.take(np.argsort(_hashes(own), kind="stable"))


def split_off(places: Places, fraction: float, seed: int) -> tuple[Places, Places]:
    """(the others, `fraction` of each class, rounded, but one image at least and never all): chosen by a hash of
    (seed, name), so that images that come or go move few others."""
    ranks = _hashes(f"{seed}\0".encode() + places._bytes(i) for i in range(len(places)))
    labels, numbers = np.unique(places.labels, return_counts=True)
    counts = np.minimum(np.maximum(1, np.rint(fraction * numbers)), numbers - 1)
    order = np.lexsort((ranks, places.labels))  # class by class
    of = np.searchsorted(labels, places.labels[order])
    within = np.arange(len(order)) - (np.cumsum(numbers) - numbers)[of]
    chosen = np.zeros(len(places), dtype=bool)
    chosen[order[within < counts[of]]] = True
    return places.take(np.flatnonzero(~chosen)), places.take(np.flatnonzero(chosen))


def _hashes(texts: Iterable[bytes]) -> NDArray[np.uint64]:
    """(n,) one each."""
    found = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts]
    return np.array(found, dtype=np.uint64)
