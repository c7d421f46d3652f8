"""The doctor's checks between the ranks: do all of them answer, and do their clocks agree?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from ghostmask.engine.errors import InputError
from ghostmask.engine.launch import Launch
from ghostmask.engine.ranks import LostPeer, Ranks, join
from ghostmask.engine.world import World
from ghostmask.launcher.doctor.finding import Finding, passed, warned
from ghostmask.launcher.doctor.patient import Patient

MEET_S = 60.0
"""For all ranks to start."""
ANSWER_S = 20.0
"""For an all-reduce of a few bytes."""
POLL_S = 0.01
MEGABYTES = 16
SKEW_S = 1.0
"""Clocks that differ by more get a warning."""


def meet(launch: Launch) -> None:
    """Wait for all ranks, MEET_S long. Raises InputError that names those that do not come."""
    problem = _absence(launch) if launch.size > 1 else ""
    if problem:  # raised here, not where it was found: the cause would make it a lost contact, not wrong input
        raise InputError(f"doctor: {problem}")


def _absence(launch: Launch) -> str:
    try:
        join(launch, MEET_S).arrive(MEET_S)
    except LostPeer as error:
        return f"{error}; look at their logs; all ranks must reach MASTER_ADDR:MASTER_PORT"
    except dist.DistError as error:
        where = f"{launch.address}:{launch.port}"
        return (
            f"the ranks' store at {where} does not answer within {MEET_S:g} s ({error}); is rank 0 running there, and "
            "is the port open?"
        )
    return ""


def reach(patient: Patient) -> Finding:
    """Collective: an all-reduce through the run's own backend ends in time. Raises InputError where it does not."""
    world = patient.world
    if world.size == 1:
        return passed("one rank alone: nothing to reach")
    ranks = join(patient.launch)
    answer(world, ranks.store, ranks)
    large = torch.ones(MEGABYTES * 2**18, device=world.device)
    times = []
    for _ in range(3):
        start = perf_counter()
        world.all_reduce(large)
        float(large[0])  # waits for the device
        times.append(perf_counter() - start)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    return passed(f"{world.size} ranks, {backend}: an all-reduce of {MEGABYTES} MB takes {min(times) * 1e3:.1f} ms")


def answer(world: World, store: Any, ranks: Ranks | None = None, limit_s: float = ANSWER_S) -> None:
    """Collective: a small all-reduce. Raises InputError where it takes longer than limit_s, naming the ranks that did
    not come to it (they say so in `store`); ranks: says where they run."""
    store.set(f"doctor/{world.rank}", "")
    value = torch.ones(1, device=world.device)
    work: Any = dist.all_reduce(value, group=world.group, async_op=True)
    end = perf_counter() + limit_s
    while not work.is_completed():
        if perf_counter() > end:
            absent = [rank for rank in range(world.size) if not store.check([f"doctor/{rank}"])]
            raise InputError(f"doctor: {silence(absent, ranks, limit_s)}")
        time.sleep(POLL_S)
    work.wait()
    if float(value) != world.size:
        raise InputError(
            f"doctor: the sum of {world.size} ones over the ranks is {float(value):g}; is the network sound?"
        )


def silence(absent: Sequence[int], ranks: Ranks | None, limit_s: float) -> str:
    """What to say where an all-reduce does not end."""
    if absent:
        who = (ranks.whom(absent) if ranks else "") or f"rank {', '.join(map(str, absent))}"
        return f"{who} did not answer within {limit_s:g} s; is the process stopped, or its node overloaded?"
    return (
        f"all ranks came to an all-reduce, which did not end within {limit_s:g} s: their data do not get through; name "
        "the network interface that the nodes share (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), open its ports, and look "
        "with NCCL_DEBUG=INFO"
    )


def clocks(patient: Patient) -> Finding:
    """Collective: the clocks of all ranks agree."""
    world = patient.world
    looks = []
    for _ in range(3):
        world.barrier()
        looks.append(world.all_gather_object(time.time()))
    return skew(min(looks, key=lambda times: max(times) - min(times)), world.rank)


def skew(times: Sequence[float], rank: int) -> Finding:
    """Of this rank's clock against the median of all, read at the same moment (to milliseconds)."""
    off = times[rank] - median(times)
    if abs(off) > SKEW_S:
        return warned(
            f"the clock is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'} of most ranks'",
            "start chrony or ntpd there: logs of the nodes will not fit together",
        )
    return passed(f"all within {max(times) - min(times):.3f} s")
