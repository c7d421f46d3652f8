"""What every task of a job does: train, as the command line does, and end with its code."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import DelayedSubmission

from ghostmask.engine.errors import EXIT_INTERRUPTED, tell
from ghostmask.engine.launch import read_launch
from ghostmask.launcher.cluster.record import add_attempt, attempts, job_id, restarts

MARK = "ghostmask: attempt"
"""How the first line of an attempt begins in a log."""
LOCAL_AGAIN = 144
"""What submitit's local controller takes for: start it again."""


@dataclass(frozen=True)
class TrainJob:
    """One run, as a function that submitit calls in every task of a job.

    config: file with all its settings; run: its folder; flags: other arguments of `ghostmask train`, for a job's
    first attempt; local_ranks: > 0
    where the job is one task that starts its ranks itself; end_s: seconds after which such a job was asked to save
    because of its time limit.
    """

    config: str
    run: str
    flags: tuple[str, ...] = ()
    local_ranks: int = 0
    end_s: float = 0.0

    def __call__(self) -> int:
        """Train; returns 0. Raises SystemExit with any other code of `ghostmask train`, for the job's script."""
        began = time.monotonic()
        launch = read_launch()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        place = f"rank {launch.rank} of {launch.size} on {socket.gethostname()}, number {launch.local_rank} there"
        tell(f"{MARK} {restarts()} of job {job_id()}: {place}, GPUs {gpus}", sys.stderr)
        flags = self.flags if not any(a.get("job") == job_id() for a in attempts(Path(self.run))) else ()
        if launch.rank == 0:
            nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
            add_attempt(Path(self.run), event="start", nodes=nodes, ranks=max(launch.size, self.local_ranks))
        from ghostmask.launcher.main import main

        several = ["--ranks", str(self.local_ranks)] if self.local_ranks > 1 else []
        code = main(["train", self.config, *flags, *several])
        if code == EXIT_INTERRUPTED and self.end_s and time.monotonic() - began >= self.end_s:
            code = LOCAL_AGAIN
        if code:
            raise SystemExit(code)
        return 0

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts again after a signal that came before `train` listened to signals itself: the same."""
        return DelayedSubmission(self)
