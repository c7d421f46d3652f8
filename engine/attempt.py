"""Which attempt of a launch is this? torchrun's store outlives them, and its agents count their restarts apart.

hellos, hello/I     who asked I-th, in any attempt that used the store: a name that it made up
answer/NAME         the attempt that the rank of that name belongs to: rank 0 made it up, and answers all who ask

An attempt's ranks start after those of the one before have ended, so that only this attempt's rank 0 answers; whoever
asked before is answered too, and is not there to read it.
"""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore
from torch.distributed import DistError

POLL_S = 0.02


def attempt_of(store: Any, rank: int, timeout_s: float) -> str:
    """The name that all ranks of this attempt, and no others, get from the launch's `store`.

    Rank 0 goes on at once, and answers from a thread until all ranks have met (see engine.ranks: verdict). Raises
    torch's DistError where rank 0 does not answer in time.
    """
    name = uuid.uuid4().hex
    asking = PrefixStore("ghostmask", store)
    if rank == 0:
        threading.Thread(target=_answer, args=(asking.clone(), name), name="attempt", daemon=True).start()
        return name
    asking.set(f"hello/{asking.add('hellos', 1)}", name)
    asking.wait([f"answer/{name}"], timedelta(seconds=timeout_s))
    return str(asking.get(f"answer/{name}").decode())


def _answer(store: Any, attempt: str) -> None:
    place, met = 1, f"{attempt}/verdict"
    with suppress(DistError, RuntimeError):  # the agent, with its store, is gone
        while True:
            if store.check([f"hello/{place}"]):
                store.set(f"answer/{store.get(f'hello/{place}').decode()}", attempt)
                place += 1
            elif store.check([met]) and store.get(met) == b"go":
                return
            else:
                time.sleep(POLL_S)
