"""How do ranks end that have lost one, and may they open the sockets that many ranks need? Without processes."""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ghostmask.engine import ranks as module
from ghostmask.engine import world
from ghostmask.engine.launch import Launch
from ghostmask.engine.ranks import Ranks
from ghostmask.engine.sharding.ranks import most_ranks
from ghostmask.engine.spawn import free_port


def test_rank_0_does_not_wait_for_a_rank_that_another_one_has_found_lost() -> None:
    first = Launch(0, 3, 0, 3, "127.0.0.1", free_port())
    keeper, other, _killed = (Ranks(replace(first, rank=rank, local_rank=rank)) for rank in range(3))
    with ThreadPoolExecutor(2) as threads:
        lost = threads.submit(other.lose)
        keeper.follow()
        mine, who = lost.result(20)
        assert mine
        assert who.startswith("rank 2 on host ")
        start = time.monotonic()
        leaving = threads.submit(keeper.leave)
        other.leave()
        leaving.result(2 * module.LEAVE_S)
    assert time.monotonic() - start < module.LEAVE_S / 2


def test_a_rank_may_open_as_many_files_as_the_system_lets_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        world._allow_sockets()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("parts", "noises", "ranks", "most"), [(64, 1, 24, 16), (12, 1, 3, 3), (8, 4, 3, 2), (8, 4, 7, 4), (4, 1, 9, 4)]
)
def test_the_most_ranks_that_fit_go_on(parts: int, noises: int, ranks: int, most: int) -> None:
    assert most_ranks(parts, noises, ranks) == most
