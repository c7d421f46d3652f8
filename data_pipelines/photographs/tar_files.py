"""Where do the members of a tar file begin: their headers are read, and nothing is unpacked."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ghostmask.engine.errors import bad_value


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    offset: int
    """Of its content, from the beginning of the outermost tar file."""
    size: int


def members(path: Path, within: Member | None = None) -> Iterator[Member]:
    """The files of a tar file, or of one that is a member of it, in their order, but for hidden ones.

    Raises InputError for one that ends too early, is compressed or is none.
    """
    name = f"{path}: {within.name}" if within else str(path)
    try:
        begin, end = (within.offset, within.offset + within.size) if within else (0, os.path.getsize(path))
        with open(path, "rb") as file:
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if info.offset_data + info.size > end:
                        raise tarfile.ReadError(f"{info.name} goes on after its end")
                    if info.isfile() and not Path(info.name).name.startswith("."):
                        yield Member(info.name, info.offset_data, info.size)
    except (OSError, EOFError, tarfile.TarError) as error:
        fix = f"{name} is not a whole, uncompressed tar file ({error}); unpack its compression, or get it again"
        raise bad_value("data.root", str(path.parent), fix) from error


def fingerprint_tars(paths: Iterable[Path]) -> str:
    """Of the files' names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(os.fsencode(path.name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
