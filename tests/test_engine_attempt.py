"""Do the ranks of an attempt find each other, and nobody of an attempt before, in a store that outlives attempts?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from ghostmask.engine.attempt import attempt_of


@pytest.fixture
def store() -> Any:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def names(store: Any, size: int) -> set[str]:
    """What `size` ranks that start together, rank 0 last, get; then they have met."""
    with ThreadPoolExecutor(size) as ranks:
        found = set(ranks.map(lambda rank: attempt_of(store.clone(), rank, 20.0), reversed(range(size))))
    for name in found:
        store.set(f"ghostmask/{name}/verdict", "go")
    return found


def test_every_attempt_has_one_name_of_its_own_whatever_its_ranks(store: Any) -> None:
    every: list[str] = []
    for size in (4, 3, 4):
        every += names(store, size)
    assert len(set(every)) == 3


def test_a_rank_whose_first_rank_does_not_come_is_told_in_time(store: Any) -> None:
    with pytest.raises(DistError):
        attempt_of(store.clone(), 1, 0.2)
    assert len(names(store, 2)) == 1, "who asked in vain is in nobody's way"
