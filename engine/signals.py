"""SIGTERM, SIGUSR1 and SIGUSR2 ask a command to stop: at once, or in the training loop after the step's save."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

REPEAT_S = 10.0
"""A library may swallow the exception that ends a command: it is raised again after this long."""


class Interrupted(BaseException):
    """A signal asked to stop where nothing is at stake: what was saved last is whole. Not an Exception, so that code
    which deals with failures lets it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; run the same command again, without --restart")
        self.number = number


class StopSignals:
    """Context in which SIGTERM, SIGUSR1 and SIGUSR2 only set `requested` to the signal's number.

    The handlers that were there before come back at the end; where the body ended as if nothing had been asked for,
    the signal is handed to them. Outside the main thread nothing is installed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        before = dict(self._before)
        self._before.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        if kind is None and callable(before.get(self.requested)):
            signal.raise_signal(self.requested)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number


class RaisingSignals(StopSignals):
    """Context in which they raise Interrupted in the main thread, again and again until `quiet` is called."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = False
        self._again: threading.Timer | None = None

    def __exit__(self, kind: object, *error: object) -> None:
        self.quiet()
        super().__exit__(Interrupted, *error)  # what was asked for was done: nobody else is asked again

    def quiet(self) -> None:
        """From now on the command is ending by itself: signals are noted only."""
        self._ending = True
        if self._again is not None:
            self._again.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        if self._ending:
            return
        self._again = threading.Timer(REPEAT_S, os.kill, (os.getpid(), number))
        self._again.daemon = True
        self._again.start()
        raise Interrupted(number)
