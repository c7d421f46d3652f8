"""Who owns a folder: a lease that its owner renews, that others respect, and that is looked at before every write.

    folder/.lease/00000003        generation 3, one line of JSON: who owns it, and after how long a silence it is free

The owner is who made the highest generation. A generation is a complete file that is linked to a name which must not
exist: that is atomic on network file systems too, where locks may be missing. Its owner renews it by setting its
modification time to another value than before, which needs no space on a full disk. Nobody compares clocks: who wants
the folder watches that value by its own clock, and takes the next generation when it has stood still for the time that
the owner itself stated, or when it can see that the owner's process is gone. An owner that was stopped, or cut off from
the disk, and comes back finds a higher generation, or its own deleted, before it publishes anything.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ghostmask.engine.atomic import read_small, sync
from ghostmask.engine.errors import EXIT_NOT_OWNER, InputError, RunStopped

FOLDER = ".lease"
SILENCE_S = 60.0
"""An owner that was not heard for so long has lost the folder to whoever asks for it."""
RENEWALS = 12
"""Renewals within that time."""
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass(frozen=True)
class Owner:
    """A process that owns a folder, as others can recognise it.

    host: the machine's name; pid: its number there, in the namespace `space` (of the kernel that booted as `boot`);
    started: when the process started, in ticks since then; job, restart: of Slurm; silence_s: see SILENCE_S.
    """

    host: str
    pid: int
    space: str
    boot: str
    started: int
    job: str
    restart: int
    silence_s: float
    token: str
    released: bool = False

    @classmethod
    def this_process(cls, silence_s: float) -> Owner:
        """The process that asks."""
        env = os.environ
        job, restart = env.get("SLURM_JOB_ID", ""), env.get("SLURM_RESTART_COUNT", "0")
        return cls(
            socket.gethostname(), os.getpid(), _space(), _boot(), _started(os.getpid())[0], job,
            int(restart) if restart.isdecimal() else 0, silence_s, uuid.uuid4().hex,
        )  # fmt: skip

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_gone(self) -> bool | None:
        """True if its process is over, False if it runs, None where this cannot be seen (stopped, or elsewhere)."""
        here = Owner.this_process(self.silence_s)
        if here.job and here.job == self.job and here.restart > self.restart:
            return True  # Slurm starts a job again only when it is over
        if not self.boot or (self.boot, self.space) != (here.boot, here.space):
            return None
        started, state = _started(self.pid)
        if started != self.started or state in "ZX":
            return True
        return None if state in "Tt" else False


class NotOwner(RunStopped):
    """Another process took the folder over: this one must not write to it any more."""

    def __init__(self, folder: Path, by: str) -> None:
        super().__init__(
            f"run = {str(folder)!r}: {by} owns it now, because this process was silent; nothing more was written",
            EXIT_NOT_OWNER,
        )


class Lease:
    """A folder that this process owns, until `release`, or until it is silent and another takes it over."""

    def __init__(self, folder: Path, generation: int, owner: Owner) -> None:
        """Not for callers: see `take`."""
        self.folder, self.generation, self.owner = folder, generation, owner
        self._file = folder / FOLDER / _name(generation)
        self._period_s = owner.silence_s / RENEWALS
        self._verified = _now()
        self._lost: NotOwner | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path, silence_s: float = SILENCE_S, say: Callable[[str], None] = lambda text: None) -> Lease:
        """Own `folder`, which is made where it is not there, once its owner is gone or silent.

        silence_s: after how long a silence others may take it from this process. say: told that a silent owner is
        waited for. Raises InputError that names an owner which lives, and where nothing can be written there.
        """
        owner = Owner.this_process(silence_s)
        try:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            while True:
                generation, before = _newest(folder)
                if before is not None and not before.released:
                    _await_silence(folder, generation, before, say)
                if _create(folder / FOLDER / _name(generation + 1), owner):
                    break
        except OSError as error:
            raise InputError(
                f"run = {str(folder)!r}: cannot be owned ({error.strerror or error}); "
                "free the disk, or give another run=NAME"
            ) from None
        for old in _generations(folder):
            if old <= generation:
                with suppress(OSError):
                    (folder / FOLDER / _name(old)).unlink()
        return cls(folder, generation + 1, owner)

    @property
    def lost(self) -> bool:
        """True once it is known that another process owns the folder; known within a renewal's time."""
        return self._lost is not None

    def check(self) -> None:
        """Raise NotOwner if another process owns the folder: to be asked right before something whole (a checkpoint, an
        export) gets its final name."""
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise self._lost

    def holds(self) -> bool:
        """Whether this process owns the folder still; looks at the disk only where the last look is old: to be asked
        before every line that is written."""
        if self._lost is None and _now() - self._verified > self._period_s / 2:
            self._look()
        return self._lost is None

    def release(self) -> None:
        """Give the folder back, once; the next process need not wait."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        with suppress(OSError, RunStopped):
            self.check()
            writing = self._file.with_name(f".{self.owner.token}")
            writing.write_text(json.dumps(asdict(self.owner) | {"released": True}))
            writing.replace(self._file)

    def _renew(self) -> None:
        while not self._over.wait(self._period_s) and self._lost is None:
            self._look()

    def _look(self) -> None:
        """Renew, and see whether that was still allowed. A disk that does not answer says nothing."""
        try:
            stat = self._file.stat()
            os.utime(self._file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2_000_000_000))  # FAT counts in 2 s
            owner = _newest(self.folder)[1]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return
            owner = owner_of(self.folder)
        if owner is None or owner.token != self.owner.token:
            self._lost = NotOwner(self.folder, str(owner or "nobody (it was removed or given back)"))
        self._verified = _now()


def owner_of(folder: Path) -> Owner | None:
    """Who owns `folder`, by what is written there; None where nobody does. Reads only."""
    with suppress(OSError):
        owner = _newest(folder)[1]
        return None if owner is None or owner.released else owner
    return None


def newest_owner(folder: Path) -> Owner | None:
    """Who owns the folder, or owned it last, without taking it; None where nobody did."""
    try:
        return _newest(folder)[1]
    except OSError:
        return None


def _await_silence(folder: Path, generation: int, owner: Owner, say: Callable[[str], None]) -> None:
    """Return when the owner is gone, was silent for its time, or is not the newest any more. Raises InputError."""
    file, silence_s = folder / FOLDER / _name(generation), owner.silence_s
    first, start, told = _beat(file), time.monotonic(), False
    while owner.is_gone() is not True:
        if owner.is_gone() is False or _beat(file) != first:
            if _newest(folder)[0] != generation:
                return
            raise InputError(
                f"run = {str(folder)!r}: {owner} is at work in it; wait for it, stop it, or give another run=NAME"
            )
        waited = time.monotonic() - start
        if waited > silence_s:
            return
        if not told:
            say(f"{folder} belongs to {owner}, which is not seen; waiting up to {silence_s:.0f} s for a sign of it")
            told = True
        time.sleep(min(0.5, silence_s / 20))


def _newest(folder: Path) -> tuple[int, Owner | None]:
    """The highest generation and its owner; (0, None) where there is none."""
    generations = _generations(folder)
    if not generations:
        return 0, None
    file = folder / FOLDER / _name(generations[-1])
    try:
        values = json.loads(read_small(file))
        return generations[-1], Owner(**values)
    except FileNotFoundError:
        return _newest(folder)  # a successor is cleaning up
    except (ValueError, TypeError):
        unknown = Owner("an unknown host", 0, "", "", 0, "", 0, SILENCE_S, "")
        return generations[-1], unknown


def _generations(folder: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder / FOLDER) if name.isdecimal())


def _create(file: Path, owner: Owner) -> bool:
    """Make a generation's file with its content, in one step; False if another process made it first."""
    writing, text = file.with_name(f".{owner.token}"), json.dumps(asdict(owner))
    writing.write_text(text)
    sync(writing)
    try:
        os.link(writing, file)
    except FileExistsError:
        # A network file system may say so of a link that it has just made, when its answer was lost.
        return writing.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with file.open("x") as made:
                made.write(text)
        except FileExistsError:
            return False
    finally:
        writing.unlink(missing_ok=True)
    sync(file.parent)
    return True


def _beat(file: Path) -> tuple[int, int]:
    """What changes when a lease is renewed, released or replaced. Opened, so that a network file system looks anew."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return 0, 0
    try:
        stat = os.fstat(handle)
    finally:
        os.close(handle)
    return stat.st_mtime_ns, stat.st_ino


def _name(generation: int) -> str:
    return f"{generation:08d}"


def _now() -> float:
    """Seconds that go on while the process, or the machine, sleeps, and that no clock's setting moves."""
    clock = time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC
    return time.clock_gettime(clock)


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> tuple[int, str]:
    """(start time in ticks, state letter) of a process of this machine; (-1, "X") where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]), fields[0]
    except OSError:
        return -1, "X"
