"""TensorBoard's event file. Its own writer gives the bytes to a thread, which ends with a traceback on a full disk."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghostmask.engine.appending import Appender

RESULT = "1_result"
"""The first group of cards: TensorBoard sorts them by name."""
FIRST = {
    f"{where}/{what}": f"{RESULT}/{what}_{where}"
    for where in ("eval", "train")
    for what in ("accuracy", "top5", "loss")
}
"""Name in metrics.jsonl -> card, of what is looked for first."""
PER_LAYER = ("density", "zeros")
"""Groups with a number for each layer: one histogram of them in place of as many cards."""


def event_folder(folder: Path) -> Path:
    """Where a run's event files lie: in its own folder, whose name TensorBoard gives the run; where an older version
    began it, in tensorboard/ in it."""
    old = folder / "tensorboard"
    return old if any(old.glob("events.out.tfevents.*")) else folder


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
        """Numbers by name: a card each, of PER_LAYER's groups a histogram of all that are finite."""
        from torch.utils.tensorboard.summary import histogram, scalar

        groups: dict[str, list[float]] = {}
        for name, value in values.items():
            group = name.partition("/")[0]
            if group not in PER_LAYER:
                self._add(summary=scalar(FIRST.get(name, name), value), step=step)  # type: ignore[no-untyped-call]
            elif math.isfinite(value):
                groups.setdefault(group, []).append(value)
        for group, numbers in groups.items():
            made = histogram(f"{group}/of_layers", np.asarray(numbers), 32)  # type: ignore[no-untyped-call]
            self._add(summary=made, step=step)
        self.file.push()

    def settings(self, step: int, values: Mapping[str, bool | int | float | str], whole: str) -> None:
        """The run's settings: as hyperparameters, so that runs compare in that tab, and `whole` as text.

        Of the run alone: where nobody describes an experiment, TensorBoard finds out which settings differ.
        """
        from torch.utils.tensorboard.summary import hparams, text

        made = hparams(dict(values), dict.fromkeys(FIRST.values(), 0.0))  # type: ignore[no-untyped-call]
        block = "\n".join(f"    {line}" for line in whole.splitlines())  # Markdown's code
        for summary in (made[1], text("config", block)):  # type: ignore[no-untyped-call]
            self._add(summary=summary, step=step)
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
