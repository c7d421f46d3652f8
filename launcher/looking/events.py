"""What do a run's event files say that metrics.jsonl does not: histograms, and when it was started, and where from?"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostmask.engine.atomic import read_small
from ghostmask.engine.events import event_folder

Histogram = tuple[list[float], list[float]]
"""(upper limits, how many values lie below each and above the one before)."""
LARGEST = 1 << 31
"""Bytes of an event file that is read."""
SCALAR_BYTES = 250
"""No number's record is longer."""
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


def read_events(folder: Path) -> tuple[list[Start], dict[str, tuple[int, Histogram]]]:
    """The run's starts, oldest first, and of each histogram (step, newest one). Damage ends a file's reading."""
    starts: list[Start] = []
    newest: dict[str, tuple[int, Histogram]] = {}
    for file in sorted(event_folder(folder).glob("events.out.tfevents.*")):
        start = None
        for event in _events(file):
            if start is None:
                start = Start(event.wall_time, event.wall_time, _host(file), max(0, event.step - 1), event.step)
                starts.append(start)
                newest = {name: found for name, found in newest.items() if found[0] < event.step}
            start.ended, start.last = max(start.ended, event.wall_time), max(start.last, event.step)
            for value in event.summary.value:
                if value.HasField("histo"):
                    counted = (list(value.histo.bucket_limit), list(value.histo.bucket))
                    newest[value.tag] = (event.step, counted)
    return starts, newest


def _events(file: Path) -> Iterator[Any]:
    """The first event, those large enough for a histogram, and the last one: a long run has half a million numbers."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        content = read_small(file, LARGEST)
    except OSError:
        return
    last, first = b"", True
    for record in _records(content):
        try:
            if first or len(record) > SCALAR_BYTES:
                yield Event.FromString(record)
            last, first = record, False
        except DecodeError:
            return
    with suppress(DecodeError):
        if last:
            yield Event.FromString(last)


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
