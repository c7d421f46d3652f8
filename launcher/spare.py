"""What do the ranks do that a run has no part for? Where torchrun starts ranks again, they wait until that happens.

A run whose batch is cut into 8 parts takes 8, 4, 2 or 1 ranks. When one of 4 nodes is lost, 2 of the remaining 3 go on
with it, and the third is there when the fourth comes back. Rank 0 keeps a store at the launch's address, beside that of
the ranks in the run, in which it says how the run ended:

waiting, left    spare ranks that have come, and that know the end
end              the run's exit code; without it, the store's end is the run's
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistError

from ghostmask.engine.errors import EXIT_LOST, say
from ghostmask.engine.launch import Launch
from ghostmask.engine.ranks import JOIN_S, LEAVE_S
from ghostmask.engine.sharding.ranks import most_ranks
from ghostmask.launcher.config import RunConfig

LOOK_S = 1.0


class Spares:
    """The ranks of a launch that its run has no part for, as rank 0 knows them, or as one of them."""

    def __init__(self, launch: Launch, used: int) -> None:
        self.count = launch.size - used
        self.is_one = launch.rank >= used
        self._launch = launch
        self._store: Any = None
        if launch.rank == 0:
            self._store = self._meet(JOIN_S)
            verb = "waits" if self.count == 1 else "wait"
            say(f"{launch.size} ranks do not fit the run's parts: {used} of them train, {self.count} {verb}")

    def wait(self) -> int:
        """On a spare rank: the run's exit code, once it is over; EXIT_LOST where rank 0 ends without one."""
        os.environ.update(RANK="0", WORLD_SIZE="1")  # nobody's peer: what ends this process ends no other
        try:
            store = self._meet(JOIN_S)
            store.add("waiting", 1)
            while not store.check(["end"]):
                time.sleep(LOOK_S)
            code = int(store.get("end"))
            store.add("left", 1)
            return code
        except (DistError, RuntimeError):
            return EXIT_LOST

    def dismiss(self, code: int) -> None:
        """On rank 0: the run is over. Returns when all of them know."""
        self._store.set("end", str(code))
        end = time.monotonic() + LEAVE_S
        while self._store.add("left", 0) < self._store.add("waiting", 0) and time.monotonic() < end:
            time.sleep(0.1)

    def _meet(self, timeout_s: float) -> PrefixStore:
        launch = self._launch
        keeps = launch.rank == 0 and not launch.agent
        store = TCPStore(
            launch.address, launch.port, None, keeps, timedelta(seconds=timeout_s), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
        return PrefixStore("spares", store)


def spare_ranks(config: RunConfig, launch: Launch) -> Spares | None:
    """Leave only as many ranks in the launch as fit `config`, where torchrun starts ranks again with other numbers of
    them; the spare ones, or None where all fit, or where a number that does not is the user's mistake."""
    parts = config.train.replicas
    used = most_ranks(parts, config.noises, launch.size) if parts and launch.restarts else launch.size
    if used == launch.size:
        return None
    spares = Spares(launch, used)
    if not spares.is_one:
        os.environ.update(WORLD_SIZE=str(used), LOCAL_WORLD_SIZE=str(min(launch.local_size, used)))
    return spares
