"""What does a person see while a run trains: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from time import monotonic, perf_counter
from typing import Any, TextIO

from tqdm import tqdm

from ghostmask.engine.errors import tell
from ghostmask.engine.world import World


class Progress:
    """Shows how far a run of total_steps optimizer steps is, on rank 0; every method does nothing on the other ranks.

    On a terminal: `search 3/300 |####      |  12% 1:02:03 left, loss 0.312, accuracy 0.91, density 0.4, images/s 1200`,
    updated in place. Elsewhere: a line per call. Time left is reckoned from the first update, not from step 0, so it is
    right after a resume.
    """

    def __init__(self, world: World, total_steps: int, stream: TextIO | None = None) -> None:
        """stream: standard error by default; a terminal gets the bar."""
        self._stream = (stream or sys.stderr) if world.is_main else None
        self._pulse = world.pulse
        self.total_steps = total_steps
        self._bar: Any = None
        self._first: tuple[int, float] | None = None

    def update(self, step: int, fields: Mapping[str, float | str]) -> None:
        """Show that `step` steps are done, with fields in their order: phase, epoch, loss, images/s, ..."""
        self._pulse.reported, self._pulse.said = True, monotonic()
        if self._stream is None:
            return
        if self._stream.isatty():
            self._update_bar(step, fields)
            return
        left = self._time_left(step)
        texts = [f"step {step}/{self.total_steps}", *_texts(fields), *([f"{left} left"] if left else [])]
        self._print(" ".join(texts))

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        self._pulse.said = monotonic()
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._stream is not None:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        self._stream = None

    def _update_bar(self, step: int, fields: Mapping[str, float | str]) -> None:
        if self._bar is None:
            # Time left stands before the fields: a narrow terminal cuts off the end of the line.
            layout = "{desc}|{bar:10}|{percentage:4.0f}% {remaining} left{postfix}"
            self._bar = tqdm(
                total=self.total_steps,
                initial=step,
                file=self._stream,
                bar_format=layout,
                dynamic_ncols=True,
                miniters=1,
                delay=1e-9,  # nothing is drawn before the first fields are there
            )
        head = {name: value for name, value in fields.items() if name in ("phase", "epoch")}
        rest = {name: value for name, value in fields.items() if name not in head}
        self._bar.set_description_str(" ".join(map(str, head.values())) + " ", refresh=False)
        self._bar.set_postfix_str(", ".join(_texts(rest)), refresh=False)
        if step == self._bar.n:
            self._bar.refresh()
        else:
            self._bar.update(step - self._bar.n)  # draws at most every 0.1 s

    def _time_left(self, step: int) -> str:
        """h:mm:ss at the average rate since the first update; empty at the first one."""
        now = perf_counter()
        if self._first is None or step <= self._first[0]:
            self._first = self._first or (step, now)
            return ""
        first_step, first_time = self._first
        return str(timedelta(seconds=round((now - first_time) / (step - first_step) * max(0, self.total_steps - step))))

    def _print(self, line: str) -> None:
        tell(line, self._stream or sys.stderr)


def _texts(fields: Mapping[str, float | str]) -> list[str]:
    return [str(value) if name == "phase" else f"{name} {_short(value)}" for name, value in fields.items()]


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
