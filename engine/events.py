"""TensorBoard's event file. Its own writer gives the bytes to a thread, which ends with a traceback on a full disk."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ghostmask.engine.appending import Appender


class EventFile:
    """A new event file in a folder. file: where its bytes go, for `sync` and `close`."""

    def __init__(self, folder: Path, purge_step: int, holds: Callable[[], bool], warn: Callable[[str], None]) -> None:
        """purge_step: TensorBoard hides what earlier files hold of this step and later ones. holds, warn: see Appender.
        Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = Appender(folder / name, holds, warn)
        self._records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2", step=purge_step)
        self._add(session_log=SessionLog(status=SessionLog.START), step=purge_step)
        self.file.push_or_raise()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._add(summary=scalar(name, value), step=step)  # type: ignore[no-untyped-call]
        self.file.push()

    def histogram(
        self, step: int, name: str, low: float, high: float, numel: int, total: float, squares: float,
        limits: Sequence[float], counts: Sequence[int],
    ) -> None:  # fmt: skip
        """A distribution of `numel` values in [low, high]: their sum, sum of squares, and how many lie in each bucket
        below its limit."""
        from torch.utils.tensorboard.summary import histogram_raw

        made = histogram_raw(name, low, high, numel, total, squares, limits, counts)  # type: ignore[no-untyped-call]
        self._add(summary=made, step=step)
        self.file.push()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
