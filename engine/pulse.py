"""What is this rank doing, and does it get any further? Written by the main thread, read by the watch."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

SLOW_FACTOR = 6
"""How much longer than train.timeout_minutes what is not an ordinary step may take: opening data, compiling, saving."""


@dataclass
class Pulse:
    """Counts a rank's progress. Plain attributes: no lock, no device, nothing that costs a step anything.

    count: rises with everything the rank does; place: rises with what all ranks do together, so that the ranks with
    the lowest are those that the others wait for; what: the last of it in words; slow: whether what comes now may take
    long; since: when it began, by the monotonic clock; said: when the run last printed a line; reported: whether one
    was of its steps.
    """

    count: int = 0
    place: int = 0
    what: str = "starting"
    slow: bool = True
    since: float = field(default_factory=time.monotonic)
    said: float = 0.0
    reported: bool = False
    _main: int = field(default_factory=threading.get_ident)

    def step(self, what: str) -> None:
        """An ordinary step is done, on every rank; the next takes about as long."""
        self._note(what, slow=False)
        self.place += 1

    def enter(self, what: str) -> None:
        """Something begins, on every rank, that may take long."""
        self._note(what, slow=True)
        self.since = time.monotonic()
        self.place += 1

    def tick(self, what: str) -> None:
        """This rank got further with what it is doing."""
        self._note(what, self.slow)

    def meet(self) -> None:
        """A collective begins. Counted in the main thread alone: a save in the background has collectives too."""
        if threading.get_ident() == self._main:
            self.count += 1
            self.place += 1

    def _note(self, what: str, slow: bool) -> None:
        self.count += 1
        self.what, self.slow = what, slow
