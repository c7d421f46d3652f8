"""Where do the members of a tar file begin: their headers are read, and nothing is unpacked."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from ghostmask.engine.errors import bad_value


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    offset: int
    """Of its content, from the beginning of the outermost tar file."""
    size: int


def members(path: Path, within: Member | None = None) -> Iterator[Member]:
    """The files of a tar file, or of one that is a member of it, in their order, but for hidden ones.

    Raises InputError for one that ends too early, is compressed or is none, or has links in the place of files.
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
                    if _is_hidden(info.name):
                        continue
                    if info.islnk() or info.issym() or info.issparse():
                        raise bad_value("data.root", str(path.parent), f"{name}: {_odd(info)}")
                    if info.isfile():
                        yield Member(info.name, info.offset_data, info.size)
                _require_end(file, archive.offset, end)
    except (OSError, EOFError, tarfile.TarError) as error:
        fix = f"{name} is not a whole, uncompressed tar file ({error}); unpack its compression, or get it again"
        raise bad_value("data.root", str(path.parent), fix) from error


def fingerprint_tars(paths: Iterable[Path]) -> str:
    """Of the files' names, sizes and times. Raises InputError for a link to nowhere."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            fix = f"{path} cannot be read ({error.strerror}); get it again, or remove it"
            raise bad_value("data.root", str(path.parent), fix) from error
        digest.update(os.fsencode(path.name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def _odd(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return f"{info.name} is stored with its holes left out; write it anew without tar's --sparse"
    return f"{info.name} is a link to {info.linkname}; write it anew with tar's --dereference --hard-dereference"


def _require_end(file: IO[bytes], at: int, end: int) -> None:
    """Raise ReadError unless zeros end it: tarfile takes a damaged header, too, for the end, and reads no further."""
    file.seek(at)
    if end - at < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")
    while some := file.read(min(end - file.tell(), tarfile.RECORDSIZE)):
        if some.count(0) != len(some):
            raise tarfile.ReadError(f"what is at byte {at:,} is neither a file nor its end")
