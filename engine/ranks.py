"""How do the ranks of a run hear how the others ended? Through the launch's TCP store, beside all collectives.

start/ID        rank -> host and process, written when it joins
arrived, verdict     start-up: the last rank to arrive sets "go"; one that failed before sets "failed"
beat/ID         rank -> what it is doing (engine.watch)
code            exit code of the first rank that ended early for a reason of its own
end/ID, ends, order/I    how each rank ended, in the order in which they did
said/DIGEST     taken by the one rank that prints a line
gone, absent    ranks that need the store no longer, and that are lost: rank 0, which may keep it, leaves last
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistError

from ghostmask.engine.attempt import attempt_of
from ghostmask.engine.errors import EXIT_LOST, PeerFailed
from ghostmask.engine.launch import Launch

JOIN_S = 300.0
"""For the store to be there: rank 0 may be importing from a slow file system."""
TOGETHER_S = 2.0
"""Ranks that fail for the same reason do so within this time, and are named in one line."""
REASON_S = 5.0
"""A rank that lost its peers waits this long for one of them to say why."""
LEAVE_S = 15.0
"""Rank 0 keeps the store this long for ranks that have not left."""


class LostPeer(Exception):
    """Peers are gone, and no rank has said why."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    pid: int


class Ranks:
    """This rank's view of the others. Every method may be called without the others doing the same."""

    def __init__(self, launch: Launch, timeout_s: float = JOIN_S) -> None:
        """Join the launch's store. Raises torch's DistError where it cannot be reached in time."""
        self.launch = launch
        keeps_store = launch.rank == 0 and not launch.agent
        store = TCPStore(
            launch.address, launch.port, launch.size, keeps_store, timedelta(seconds=timeout_s),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        attempt = attempt_of(store, launch.rank, timeout_s) if launch.agent else "only"
        self.store: Any = PrefixStore(f"ghostmask/{attempt}", store)
        self.store.set(f"start/{launch.rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def twin(self, timeout_s: float) -> Ranks:
        """The same through a connection of its own, for another thread; timeout_s: for each answer."""
        twin = copy.copy(self)
        twin.store = self.store.clone()
        twin.store.set_timeout(timedelta(seconds=timeout_s))
        return twin

    def arrive(self, timeout_s: float) -> None:
        """Wait until every rank has come this far. Raises PeerFailed as soon as one has failed before it did, and
        LostPeer, which names them, where ranks do not come at all."""
        if self.store.add("arrived", 1) == self.launch.size:
            self.store.compare_set("verdict", "", "go")
        pause = _Pause(timeout_s)
        while not self.store.check(["verdict"]):
            if not pause.wait():
                absent = [r for r in range(self.launch.size) if not self.store.check([f"start/{r}"])]
                raise LostPeer(f"{_numbers(absent)} did not start within {timeout_s:g} s")
        if self.store.get("verdict") != b"go":
            raise PeerFailed

    def code(self) -> int | None:
        """The exit code of the first rank that ended early for a reason of its own; None as long as none did."""
        return int(self.store.get("code")) if self.store.check(["code"]) else None

    def wait_for_code(self) -> int | None:
        """`code`, after up to REASON_S."""
        pause = _Pause(REASON_S)
        while (code := self.code()) is None and pause.wait():
            pass
        return code

    def end(self, code: int, text: str) -> tuple[bool, str]:
        """Say that this rank ends with `code` because of `text`: (whether this rank is to print it, whom it befell).

        One rank prints a text, once, for all that ended with it; the second value is "" where all ranks did. The first
        reason of all decides the code of those that lost a peer over it.
        """
        self.store.compare_set("code", "", str(code))
        self.store.compare_set("verdict", "", "failed")
        digest = self._post(text)
        if self.store.add(f"said/{digest}", 1) > 1:
            return False, ""
        pause = _Pause(TOGETHER_S)
        while self.store.add("ends", 0) < self.launch.size and pause.wait():
            pass
        ended = [json.loads(self.store.get(f"order/{i}")) for i in range(1, self.store.add("ends", 0) + 1)]
        return True, self.whom(rank for rank, said in ended if said == digest)

    def lose(self) -> tuple[bool, str]:
        """The same for a rank that lost its peers and found no reason: the ranks that said nothing are named."""
        self._post("")
        if self.store.add("said/lost", 1) > 1:
            return False, ""
        pause = _Pause(TOGETHER_S)
        while self.store.add("ends", 0) < self.launch.size - 1 and pause.wait():
            pass
        self.store.compare_set("code", "", str(EXIT_LOST))
        absent = [r for r in range(self.launch.size) if not self.store.check([f"end/{r}"])]
        self.store.set("absent", str(len(absent)))
        return True, self.whom(absent)

    def follow(self) -> None:
        """Say that this rank ends because of another's reason."""
        self._post("")

    def leave(self) -> None:
        """The last call: rank 0 returns when the others need the store no longer."""
        left, pause = self.store.add("gone", 1), _Pause(LEAVE_S)
        while self._is_needed() and left < self.launch.size and pause.wait():
            absent = int(self.store.get("absent")) if self.store.check(["absent"]) else 0
            left = self.store.add("gone", 0) + absent

    def _is_needed(self) -> bool:
        """Whether the others need this process: for its store, or for its answers as long as they have not all met."""
        if self.launch.rank:
            return False
        return not self.launch.agent or not self.store.check(["verdict"]) or self.store.get("verdict") != b"go"

    def place(self, rank: int) -> Place | None:
        """Where `rank` runs; None before it has joined."""
        if not self.store.check([f"start/{rank}"]):
            return None
        return Place(*json.loads(self.store.get(f"start/{rank}")))

    def whom(self, ranks: Iterable[int]) -> str:
        """ "ranks 2-3 on host a, rank 7 on host b"; "" for all ranks of the launch."""
        hosts: dict[str, list[int]] = {}
        chosen = sorted(ranks)
        if len(chosen) == self.launch.size:
            return ""
        for rank in chosen:
            place = self.place(rank)
            hosts.setdefault(place.host if place else "", []).append(rank)
        return ", ".join(_numbers(there) + (f" on host {host}" if host else "") for host, there in hosts.items())

    def _post(self, text: str) -> str:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.store.set(f"end/{self.launch.rank}", "")
        place = self.store.add("ends", 1)
        self.store.set(f"order/{place}", json.dumps([self.launch.rank, digest]))
        return digest


_joined: list[Ranks] = []


def join(launch: Launch, timeout_s: float = JOIN_S) -> Ranks:
    """The process's Ranks: it joins once, and speaks last after everything else in it has ended."""
    if not _joined:
        _joined.append(Ranks(launch, timeout_s))
    return _joined[0]


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that the connection to a peer broke or that a peer did not answer."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DistError | LostPeer) or (isinstance(seen, RuntimeError) and "gloo" in str(seen).lower()):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _numbers(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


class _Pause:
    """Waits that grow from 10 ms to half a second, up to a time in all."""

    def __init__(self, limit_s: float) -> None:
        self._end, self._next = time.monotonic() + limit_s, 0.01

    def wait(self) -> bool:
        """Sleep; False where the time is over."""
        left = self._end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(self._next, left))
        self._next = min(self._next * 1.5, 0.5)
        return True
