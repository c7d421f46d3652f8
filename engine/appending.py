"""How is a file written, line after line, on a disk that is full now and then: nothing is lost, and nobody waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from ghostmask.engine.atomic import sync_handle

REPEAT_S = 60.0
"""Between two words about a disk that takes nothing."""


class Appender:
    """A file that is only appended to, as tensorboard's RecordWriter wants one.

    `write` keeps the bytes, `push` brings them to the file in one call where the disk takes them; what it does not take
    waits in memory and goes first the next time, from the byte on that it stopped at.
    """

    def __init__(self, path: Path, holds: Callable[[], bool], warn: Callable[[str], None]) -> None:
        """holds: asked before every push; nothing is written once it says no. warn: told, once in a while, that the
        disk takes nothing. Raises OSError where the file cannot be opened."""
        self.path, self._holds, self._warn, self._warned_at = path, holds, warn, 0.0
        self._pending = bytearray()
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        """Take bytes to be written by the next push."""
        self._pending += data

    def push(self) -> None:
        """Write what waits. OSErrors are told to `warn`."""
        try:
            self.push_or_raise()
        except OSError as error:
            self._say(error)

    def push_or_raise(self) -> None:
        """Write what waits. Raises OSError."""
        while self._pending and self._holds():
            del self._pending[: os.write(self._handle, self._pending)]

    def sync(self) -> None:
        """Write what waits, and bring the file to disk."""
        self.push()
        try:
            sync_handle(self._handle)
        except OSError as error:
            self._say(error)

    def close(self) -> None:
        """Write what waits, or say what is lost."""
        self.sync()
        os.close(self._handle)
        if self._pending and self._holds():
            self._warn(f"{self.path}: its last {len(self._pending)} bytes could not be written")

    def _say(self, error: OSError) -> None:
        if not self._warned_at or perf_counter() - self._warned_at > REPEAT_S:
            self._warned_at = perf_counter()
            self._warn(f"{self.path} cannot be written ({error.strerror or error}); training goes on, and so do tries")
