"""How long does the projection take on 8 to 4,096 ranks: a model from two measured numbers, checked on real processes.

    seconds(R) = fixed + per_element * n / R + calls * latency

fixed and per_element are measured on one rank of this machine, for the exact projection (3 calls) and for bisection
(one call for the check, one for the maximum, one per probe); latency is that of one small all-reduce on the network.
The check runs R processes, on a quarter of the elements, and puts in what they measure themselves: their local time
and their all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.benchmarks.row import Row, faster
from ghostmask.benchmarks.textbook import PROBES
from ghostmask.benchmarks.timing import Bench, interleaved
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels.projection import project_

NUMEL, QUICK_NUMEL, FIXED_NUMEL = 25_502_912, 100_000, 64
RANKS, LATENCIES_US = (8, 64, 512, 4096), (5, 20, 100)
CALLS = {"exact": 3, "bisection": PROBES + 2}
PAYLOAD = {"exact": (2, 1216), "bisection": (1,)}
"""Numbers of 8 bytes in the largest all-reduce."""


def model_rows(bench: Bench) -> list[Row]:
    """Cases projection_model (8 to 4,096 ranks) and, on the CPU, projection_model_check (2, 4 and 8 processes)."""
    numel = QUICK_NUMEL if bench.quick else NUMEL
    fixed = _local_seconds(FIXED_NUMEL, bench)
    whole = _local_seconds(numel, bench)
    found = []
    for ranks in RANKS:
        for latency in LATENCIES_US:
            ms = {
                kind: 1000 * (fixed[kind] + (whole[kind] - fixed[kind]) / ranks + CALLS[kind] * latency / 1e6)
                for kind in CALLS
            }
            note = f"model: {ranks} ranks, {latency} us per all-reduce; baseline: bisection"
            found.append(faster("projection_model", ms["exact"], ms["bisection"], "ms", note))
    if bench.device.type == "cuda":  # where one GPU cannot be 8 ranks
        return found
    return [*found, *(row for ranks in ((2,) if bench.quick else (2, 4, 8)) for row in _check(ranks, numel // 4))]


def _local_seconds(numel: int, bench: Bench) -> dict[str, float]:
    source = _shard(numel, bench.device)
    z, budget = source.clone(), 0.1 * numel
    return interleaved(
        {
            "exact": lambda: project_([[(z, 0)]], [budget], [numel], replace(bench.world, rank=0, size=1)),
            "bisection": lambda: sharded_bisection(source, budget, single()),
        },
        3,
        bench.device,
        {"exact": lambda: z.copy_(source)},
    )


def _check(ranks: int, numel: int) -> list[Row]:
    results = run_distributed(measure, ranks, numel, timeout_s=600)
    found = []
    for kind in ("exact", "bisection"):
        local, call, total = (1000 * max(r[kind][i] for r in results) for i in range(3))
        note = f"{kind} on {ranks} processes (gloo): baseline: model, {local:.1f} + {CALLS[kind]} x {call:.3f} ms"
        predicted = local + CALLS[kind] * call
        found.append(Row("projection_model_check", total, "ms", predicted, total / predicted, note))
    return found


def measure(world: World, numel: int) -> dict[str, tuple[float, float, float]]:
    """Collective: method -> median seconds of (local work alone, one all-reduce alone, both as they are)."""
    share = numel // world.size
    source, budget = _shard(share, world.device), 0.1 * share
    z = source.clone()
    first = world.rank * share

    def restore() -> object:
        return z.copy_(source)

    payload = {kind: torch.zeros(shape, dtype=torch.int64) for kind, shape in PAYLOAD.items()}
    work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "exact": (
            lambda: project_([[(z, first)]], [budget], [share], single()),
            lambda: project_([[(z, first)]], [budget * world.size], [share * world.size], world),
        ),
        "bisection": (
            lambda: sharded_bisection(source, budget, single()),
            lambda: sharded_bisection(source, budget * world.size, world),
        ),
    }
    found = {}
    for kind, (alone, together) in work.items():
        call = _median(lambda kind=kind: world.all_reduce(payload[kind]), 20, world)  # type: ignore[misc]
        found[kind] = (_median(alone, 3, world, restore), call, _median(together, 3, world, restore))
    return found


def sharded_bisection(z: Tensor, budget: float, world: World) -> Tensor:
    """Collective: `textbook.project` of elements that are sharded over the ranks."""

    def total(values: Tensor) -> float:
        return world.all_reduce(values.sum(dtype=torch.float64)).item()

    if total(z.clamp(0, 1)) <= budget:
        return z.clamp(0, 1)
    low, high = 0.0, world.all_reduce(z.max().double(), dist.ReduceOp.MAX).item()
    for _ in range(PROBES):
        middle = (low + high) / 2
        if total((z - middle).clamp(0, 1)) > budget:
            low = middle
        else:
            high = middle
    return (z - (low + high) / 2).clamp(0, 1)


def _shard(numel: int, device: torch.device) -> Tensor:
    z = torch.rand(numel, generator=torch.Generator(device).manual_seed(4), device=device)
    return z.add_(0.01)


def _median(
    work: Callable[[], object], repeats: int, world: World, prepare: Callable[[], object] | None = None
) -> float:
    seconds = []
    for _ in range(repeats + 1):
        if prepare:
            prepare()
        world.barrier()
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return median(seconds[1:])
