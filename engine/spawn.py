"""Runs a function on N ranks of one machine (gloo over loopback): for tests, benchmarks and the laptop."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torchvision.models.resnet",
    "ghostmask.engine.spawn",
    "ghostmask.engine.trainer",
]
"""Imported once by the fork server, so that a rank starts in milliseconds instead of the 10-20 s of these imports."""


_preload: list[str] = []


def fork_server(*modules: str) -> ForkServerContext:
    """multiprocessing's fork server: a process without threads that has imported `modules`, and those named before it
    was started. A script whose top level starts work needs `if __name__ == "__main__"`, as with every such context."""
    _preload.extend(module for module in modules if module not in _preload)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_preload)
    return context


def run_distributed(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """[function(world, *args) of rank 0, rank 1, ...], each rank a process of its own with one torch thread.

    function must be importable (module level) and its result picklable. Raises RuntimeError with the first failing
    rank's traceback; the other ranks are then killed.
    """
    context = fork_server(*PRELOAD)
    results: Any = context.Queue()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(function, r, size, port, args, results)) for r in range(size)]
    for process in ranks:
        process.start()
    values: dict[int, Any] = {}
    try:
        while len(values) < size:
            rank, value, error = _next(results, ranks, timeout_s)
            if error:
                raise RuntimeError(f"rank {rank} of {size} failed:\n{error}")
            values[rank] = pickle.loads(value)
    except BaseException:
        for process in ranks:
            process.kill()
        raise
    finally:
        for process in ranks:
            process.join()
    return [values[r] for r in range(size)]


def free_port() -> int:
    """A TCP port that was free on the loopback interface a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _next(results: Any, ranks: list[Any], timeout_s: float) -> tuple[int, Any, str | None]:
    waited = 0.0
    while waited < timeout_s:
        try:
            item: tuple[int, Any, str | None] = results.get(timeout=1.0)
            return item
        except queue.Empty:
            waited += 1.0
            dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0)]
            if dead and results.empty():
                raise RuntimeError(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}") from None
    raise TimeoutError(f"no result within {timeout_s:g} s")


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, args: tuple[Any, ...], results: Any) -> None:
    gc.freeze()  # else the first full collection goes over, and so copies, all that the fork server has imported

    import torch
    import torch.distributed as dist

    from ghostmask.engine.world import World

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=120))
        world = World(rank, size, torch.device("cpu"), dist.group.WORLD)
        # Bytes, not tensors: those would be handed over as shared memory that ends with this process.
        results.put((rank, pickle.dumps(function(world, *args)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
