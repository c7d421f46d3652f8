"""A rank that hangs is named, and ends the run: a thread beside each rank's work tells the others how far it is."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import DistError

from ghostmask.engine.errors import EXIT_HUNG, EXIT_LOST, say
from ghostmask.engine.pulse import SLOW_FACTOR, Pulse
from ghostmask.engine.ranks import Ranks

BEAT_S, SILENCE_S = 2.0, 60.0
"""Between heartbeats, and without one until it is said (both less where train.timeout_minutes is short)."""
GRACE_S = 30.0
"""A rank whose peer has ended has this long to notice by itself: in a broken collective, or at the next vote."""
ANSWER_S = 20.0
"""For the store to answer; after that, the rank that keeps it is stopped."""


@dataclass(frozen=True)
class Beat:
    """What a rank said of itself last: number of the heartbeat, progress (see Pulse), what it is doing."""

    number: int
    place: int
    what: str


class Watch:
    """The thread of one rank. It has its own connection to the store and takes part in no collective.

    timeout_minutes: without progress after which the rank ends with EXIT_HUNG (SLOW_FACTOR times that where the pulse
    says that something slow is under way); dumps: folder for the stacks of all threads and torch's flight recorder.
    Rank 0 reads all heartbeats, rank 1 those of rank 0, and all if rank 0 is silent; the others only look whether a
    rank has ended.
    """

    def __init__(self, ranks: Ranks, pulse: Pulse, timeout_minutes: float, dumps: Path | None) -> None:
        self.limit_s = 60 * timeout_minutes
        self.silence_s = min(SILENCE_S, self.limit_s / 2)
        self.interval_s = min(BEAT_S, self.silence_s / 4)
        self.answer_s = min(ANSWER_S, self.silence_s)
        self.ranks, self.pulse, self.dumps = ranks.twin(self.answer_s), pulse, dumps
        self.rank, self.size = ranks.launch.rank, ranks.launch.size
        self._keeper = ""
        self._clock = self._progress_at = self._fine_at = 0.0
        self._number, self._count = 0, -1
        self._code: int | None = None
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._named: str = ""
        self._broken = False
        self._asking: threading.Thread | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin; the others see this rank from now on. Every rank must have joined."""
        self._beat()
        self._keeper = self._describe(0)
        self._thread.start()

    def stop(self) -> None:
        """The rank's work is over."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.interval_s):
            now = time.monotonic()
            # Time in which this process was stopped is nobody's silence: it knows nothing of it.
            self._clock += min(now - before, self.interval_s + 2 * self.answer_s)
            before = now
            if self.pulse.count != self._count:
                self._count, self._progress_at = self.pulse.count, self._clock
            answered = self._ask(self._exchange)
            if self._over.is_set():
                return
            idle_s = self._clock - self._progress_at
            if self._code == EXIT_HUNG or idle_s > self.limit_s * (SLOW_FACTOR if self.pulse.slow else 1):
                self._end_hung(idle_s)
            if not answered and self.rank == 1:
                self._name(f"no sign of {self._keeper}, which keeps the ranks' store, for {self.answer_s:g} s")
            if self._code is None and not self._broken:
                self._fine_at = self._clock
            if self._clock - max(self._fine_at, self._progress_at) > GRACE_S:
                self._end(self._code or EXIT_LOST)

    def _ask(self, question: Callable[[], None]) -> bool:
        """Whether the store let `question` end in time. A store whose process is stopped never answers: the question
        then waits in a thread of its own, and no other is asked before it."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=question, daemon=True)
            self._asking.start()
        self._asking.join(self.answer_s)
        return not self._asking.is_alive()

    def _exchange(self) -> None:
        """One heartbeat, and what the others say."""
        try:
            self._beat()
            self._code = self.ranks.code()
            if self._code is None:
                self._look()
        except (DistError, RuntimeError):
            self._broken = True  # the process that kept the store is gone

    def _beat(self) -> None:
        self._number += 1
        beat = [self._number, self.pulse.place, self.pulse.what]
        self.ranks.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _look(self) -> None:
        """Name the ranks that give no sign, or, where this rank gets no further, those that it waits for."""
        if self.rank > 1:
            return
        self._hear(range(self.size) if self.rank == 0 else [0])
        silent = self._silent()
        if self.rank == 1 and silent:
            self._hear(range(self.size))
            silent = self._silent()
        idle_s = self._clock - self._progress_at
        if silent and (self.rank == 0 or 0 in silent):
            self._name(f"no sign of {self._those(silent)} for {self.silence_s:g} s")
        elif self.rank == 0 and idle_s > self.silence_s and not self.pulse.slow:
            self._name(f"no rank gets any further for {self.silence_s:g} s, {self._waited_for()}")
        elif not silent and idle_s < self.silence_s:
            self._named = ""

    def _hear(self, ranks: range | list[int]) -> None:
        values = self.ranks.store.multi_get([f"beat/{r}" for r in ranks])
        for rank, value in zip(ranks, values, strict=True):
            beat = Beat(*json.loads(value))
            if rank not in self._heard or self._heard[rank][0].number != beat.number:
                self._heard[rank] = (beat, self._clock)

    def _silent(self) -> list[int]:
        return [r for r, (_, at) in self._heard.items() if self._clock - at > self.silence_s]

    def _waited_for(self) -> str:
        lowest = min(beat.place for beat, _ in self._heard.values())
        behind = [r for r, (beat, _) in self._heard.items() if beat.place == lowest]
        return f"all of them at {self.pulse.what}" if len(behind) == self.size else f"waiting for {self._those(behind)}"

    def _those(self, ranks: list[int]) -> str:
        shown = ", ".join(self._describe(rank) for rank in ranks[:8])
        return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _describe(self, rank: int) -> str:
        place = self.ranks.place(rank)
        last = f", last at: {self._heard[rank][0].what}" if rank in self._heard else ""
        return f"rank {rank}" + (f" on host {place.host} (process {place.pid}{last})" if place else "")

    def _name(self, what: str) -> None:
        if what != self._named:
            self._named = what
            slow = f"{SLOW_FACTOR} times that while it opens data, compiles or saves"
            say(f"warning: {what}; all ranks end after {self.limit_s / 60:g} minutes without progress ({slow})")

    def _end_hung(self, idle_s: float) -> None:
        """Dump what this rank is doing and end it; the first rank to come here says whom it waited for."""
        where = f"; what each rank was doing is in {self.dumps}" if self.dumps and self._dump(self.dumps) else ""
        how = f"no progress for {idle_s:.0f} s: {{}}{where}; run the same command again, without --restart"
        if not self._ask(lambda: self._explain(how)) and self.rank == 1:
            say(how.format(f"no sign of {self._keeper}"))
        self._end(EXIT_HUNG)

    def _explain(self, how: str) -> None:
        with suppress(DistError, RuntimeError):
            if self.ranks.store.add("said/hung", 1) > 1:
                return
            self.ranks.store.compare_set("code", "", str(EXIT_HUNG))
            self._heard.clear()
            self._hear(range(self.size))
            first = {rank: beat.number for rank, (beat, _) in self._heard.items()}
            time.sleep(2 * self.interval_s)
            self._hear(range(self.size))
            still = {rank for rank, (beat, _) in self._heard.items() if beat.number == first[rank]} - {self.rank}
            say(how.format(f"no sign of {self._those(sorted(still))}" if still else self._waited_for()))

    def _dump(self, folder: Path) -> bool:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"stacks-rank-{self.rank}.txt", "w") as file:
                file.write(f"rank {self.rank} of {self.size}, process {os.getpid()}, at: {self.pulse.what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            for backend in ("gloo", "nccl"):
                with suppress(RuntimeError):
                    trace = torch._C._distributed_c10d._dump_fr_trace(backend=backend)
                    (folder / f"{backend}_trace_{self.rank}").write_bytes(trace)
            return True
        return False

    def _end(self, code: int) -> None:
        """The main thread sits in a call that does not return: the process ends without it."""
        self._ask(self._leave)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)

    def _leave(self) -> None:
        with suppress(DistError, RuntimeError):
            self.ranks.follow()
            self.ranks.leave()
