"""Runs a function as rank 0 of as many ranks as one likes, in a process group whose collectives return at once."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from ghostmask.engine.spawn import PRELOAD, fork_server

TIMEOUT_S = 300


def on_fake_ranks(function: Callable[..., Any], size: int, *args: Any) -> Any:
    """function(world, *args) of rank 0 of `size`; what other ranks would send never comes, so only sizes are right.

    function must be importable and its result picklable. Raises RuntimeError with the process's traceback.
    """
    context = fork_server(*PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_rank, args=(function, size, args, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_S):
            raise TimeoutError(f"no result within {TIMEOUT_S} s")
        value, error = receiver.recv()
    except EOFError:
        value, error = None, f"it ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise RuntimeError(f"rank 0 of {size} fake ranks failed:\n{error}")
    return pickle.loads(value)


def _rank(function: Callable[..., Any], size: int, args: tuple[Any, ...], sender: Any) -> None:
    # DeepSpeed reads these; there is no launcher.
    os.environ.update(RANK="0", WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_SIZE="1", DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ghostmask.engine.world import World

    torch.set_num_threads(1)
    try:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        value = function(World(0, size, torch.device("cpu"), dist.group.WORLD), *args)
        sender.send((pickle.dumps(value), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
