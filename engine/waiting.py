"""Does a person see what goes on while something takes long? A thread says it: of a run on rank 0, from its pulse."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from ghostmask.engine.errors import SO_FAR, printable
from ghostmask.engine.pulse import Pulse

QUIET_S, LONGEST_S = 5.0, 60.0
"""Silence after which it is said what goes on; each time twice as long as before, up to the longest."""


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """What a command without ranks does inside; prints `what: 5 s so far` on stderr where that takes long."""
    waiting = Waiting(Pulse(what=printable(what)))
    waiting.start()
    try:
        yield
    finally:
        waiting.stop()


class Waiting:
    """Prints `checkpoint step-00000120: verifying: 5 s so far` for what takes longer than quiet_s (None: QUIET_S).

    That is whatever began with `Pulse.enter`; and ordinary steps until the run's first report of them.
    """

    def __init__(self, pulse: Pulse, quiet_s: float | None = None) -> None:
        self.pulse, self.quiet_s = pulse, QUIET_S if quiet_s is None else quiet_s
        self._wait_s, self._since, self._spoke = self.quiet_s, 0.0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(min(0.5, self.quiet_s / 4)):
            if line := self.due(monotonic()):
                speak(line)

    def due(self, now: float) -> str:
        """What is to be said at `now`, in seconds of the monotonic clock; "" for nothing."""
        pulse = self.pulse
        if not pulse.slow and pulse.reported:
            return ""
        if pulse.since != self._since:
            self._since, self._wait_s = pulse.since, self.quiet_s
        if now < max(pulse.since, self._spoke, pulse.said) + self._wait_s:
            return ""
        self._spoke, self._wait_s = now, min(2 * self._wait_s, LONGEST_S)
        return f"ghostmask: {pulse.what}: {now - pulse.since:.0f}{SO_FAR}"


def speak(line: str) -> None:
    """Print a line on stderr, above a bar that may be there; nothing where it is closed."""
    stream = sys.stderr
    with suppress(OSError, ValueError):
        if stream is not None and stream.isatty():
            from tqdm import tqdm  # 50 ms, which looking at runs need not wait for

            tqdm.write(line, file=stream)
        elif stream is not None:
            print(line, file=stream, flush=True)
