"""Where do a dataset's .beton files lie, and are they whole: a small JSON beside each says what it must be."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError

FOLDER = "beton"
"""Below data.root."""
FORMAT = 3
"""Raised when the way .beton files are written changes: older ones are then written anew."""
READ_WHOLE_BYTES = 1 << 30
"""Files up to this size are checked byte for byte (0.1 s for CIFAR), larger ones at both ends, with FFCV's tables."""
END_BYTES = 1 << 26
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What is known of a complete .beton file."""

    fingerprint: str
    """Of the source it was written from."""
    num_images: int
    num_classes: int
    num_bytes: int
    crc32: int
    """Of the whole file, or of both ends of a large one."""
    content: str = ""
    """Of the images and labels in their order, as the source has them: equal wherever and however they are written."""
    counts: list[int] = field(default_factory=list)
    """Images of each class."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of their labels; [] where they have none."""
    words: dict[str, str] = field(default_factory=dict)
    """Name of a class -> the class in words, where the source has them."""
    left_out: int = 0
    """Images that could not be read."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings it was written with."""
    format: int = FORMAT


def beton_path(root: str | Path, name: str, split: str) -> Path:
    """ROOT/beton/NAME-SPLIT.beton; NAME holds the dataset and its writer settings."""
    return Path(root) / FOLDER / f"{name}-{split}.beton"


def manifest_path(beton: Path) -> Path:
    """The JSON beside a .beton."""
    return beton.with_suffix(".json")


def read_manifest(beton: Path) -> Manifest:
    """The manifest of a file that is there, in today's format and whole. Raises InputError that says what is wrong."""
    manifest = peek_manifest(beton)
    if not beton.is_file():
        raise InputError(f"there is no {beton}")
    if manifest is None:
        raise InputError(f"{manifest_path(beton)} is missing or unreadable: {beton.name} was not written to its end")
    if manifest.format != FORMAT:
        raise InputError(f"{beton} has format {manifest.format}, this version writes {FORMAT}")
    try:
        size = beton.stat().st_size
        if size != manifest.num_bytes:
            raise InputError(f"{beton} is damaged: it has {size:,} bytes instead of {manifest.num_bytes:,}")
        found = checksum(beton)
    except OSError as error:
        raise InputError(f"{beton} cannot be read ({error.strerror})") from error
    if found != manifest.crc32:
        raise InputError(f"{beton} is damaged: its content does not match its checksum")
    return manifest


def peek_manifest(beton: Path) -> Manifest | None:
    """What the JSON says, without a look at the .beton; None if there is none that can be read."""
    try:
        return Manifest(**json.loads(read_small(manifest_path(beton))))
    except (OSError, ValueError, TypeError):
        return None


def publish(partial: Path, beton: Path, **known: Any) -> Manifest:
    """Give a completely written file its name, and the manifest that makes it valid; both survive a power cut.

    known: fields of the manifest, but for the file's own.
    """
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    manifest = Manifest(**known, num_bytes=partial.stat().st_size, crc32=checksum(partial))
    # Without its manifest a .beton is not valid, so at no point is an old manifest seen beside a new file.
    manifest_path(beton).unlink(missing_ok=True)
    os.replace(partial, beton)
    partial_manifest = partial.with_suffix(".json")
    with open(partial_manifest, "w") as text:
        json.dump(asdict(manifest), text, indent=2)
        text.flush()
        os.fsync(text.fileno())
    os.replace(partial_manifest, manifest_path(beton))
    return manifest


def checksum(path: Path) -> int:
    """CRC-32 of the file, or of its first and last END_BYTES if it is larger than READ_WHOLE_BYTES."""
    size = path.stat().st_size
    spans = [(0, size)] if size <= READ_WHOLE_BYTES else [(0, END_BYTES), (size - END_BYTES, END_BYTES)]
    value = 0
    with open(path, "rb") as file:
        for start, length in spans:
            file.seek(start)
            left = length
            while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
                value = zlib.crc32(chunk, value)
                left -= len(chunk)
    return value
