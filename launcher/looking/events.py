"""What do a run's event files say that metrics.jsonl does not: when it was started, and where?"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostmask.engine.atomic import read_small
from ghostmask.engine.events import event_folder

LARGEST = 1 << 31
"""Bytes of an event file that is read."""
HEAD = 12
"""Bytes of a record's length and its checksum."""


@dataclass
class Start:
    """One process of the run: when it began and wrote last, in seconds since 1970, on which machine, after which step
    it went on, 0 at the run's beginning, and the last step it wrote of."""

    began: float
    ended: float
    host: str
    after: int
    last: int


def read_starts(folder: Path) -> list[Start]:
    """The run's starts, oldest first. Damage ends a file's reading."""
    starts: list[Start] = []
    for file in sorted(event_folder(folder).glob("events.out.tfevents.*")):
        events = list(_ends(file))
        if events:
            first, last = events[0], events[-1]
            step = max(event.step for event in events)
            starts.append(Start(first.wall_time, last.wall_time, _host(file), max(0, first.step - 1), step))
    return starts


def _ends(file: Path) -> Iterator[Any]:
    """The first event and the last one: a long run has half a million."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        records = list(_records(read_small(file, LARGEST)))
    except OSError:
        return
    with suppress(DecodeError):
        for record in (*records[:1], *records[-1:]):
            yield Event.FromString(record)


def _records(content: bytes) -> Iterator[bytes]:
    """TFRecord's framing: length, its checksum, data, their checksum. A torn end is left out."""
    at = 0
    while at + HEAD <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + HEAD + length + 4 > len(content):
            return
        yield content[at + HEAD : at + HEAD + length]
        at += HEAD + length + 4


def _host(file: Path) -> str:
    """events.out.tfevents.TIME.HOST.PID, where the time and the host may have dots."""
    return ".".join(file.name.split(".")[5:-1])
