"""--ranks N: N ranks of this machine, started by torchrun's own agent, and one exit code for all of them."""

from __future__ import annotations

import logging
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ghostmask.engine.errors import EXIT_INTERRUPTED, EXIT_LOST, say

SAVE_S = 600
"""After a signal the ranks have this long for the step's save; torchrun's default is 30 s."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Passed on to the ranks."""


def start_ranks(count: int, argv: Sequence[str]) -> int:
    """Run `ghostmask` with `argv`, less --ranks, on `count` ranks; returns the code that the first to fail ended with.

    After a signal that is the code of an interrupted command; the ranks themselves have said what was saved. A rank
    that the system killed makes it EXIT_LOST.
    """
    logging.disable(logging.CRITICAL)  # the agent's reports: the ranks speak for themselves
    # torch 2.11 kills after 30 s; the last checkpoint before that is intact.
    known = {field.name for field in fields(LaunchConfig)}
    patience: dict[str, Any] = {"shutdown_timeout": SAVE_S} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, signals_to_handle=SIGNALS, **patience,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "ghostmask", *_without_ranks(argv))
    except SignalException as stop:
        return 130 if stop.sigval == signal.SIGINT else EXIT_INTERRUPTED
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        say(f"rank {rank} (process {failure.pid}) was ended by {name}")
        return EXIT_LOST
    return 0


def _without_ranks(argv: Sequence[str]) -> list[str]:
    rest, arguments = [], iter(argv)
    for item in arguments:
        if item == "--ranks":
            next(arguments)
        elif not item.startswith("--ranks="):
            rest.append(item)
    return rest
