"""The last line of a job's script: its ranks have ended, with this code; is the job started again?

    python -m ghostmask.launcher.cluster.ended FOLDER CODE

Decided here and not by submitit, whose decision falls in a signal handler of rank 0, which may be waiting in a
collective, or gone. It runs on the job's first machine, which no rank's failure ends; where that machine itself is
lost, Slurm starts the job again.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghostmask.engine.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_LOST, LOADING, SO_FAR, say
from ghostmask.launcher.cluster import slurm
from ghostmask.launcher.cluster.job import MARK
from ghostmask.launcher.cluster.record import add_attempt, attempts, job_id, read_job, restarts
from ghostmask.launcher.cluster.slurm import SlurmJob

AGAIN = (EXIT_INTERRUPTED, EXIT_LOST, EXIT_HUNG)
"""Codes after which the same command goes on."""
FUTILE, INTERRUPTED = 3, 10
"""Attempts in a row that ended without a new checkpoint, by themselves, or by signals too: another one would do so."""
LAST_LINES, LINE = 20, 400
"""Of what a failed rank said, and how long a line of it may be."""
TRACEBACK = "Traceback (most recent call last)"
PREFIX = re.compile(r"^\[rank\d+\]: ")
"""Of torch.distributed, before the lines of a traceback."""
RUNS = "runs.json"
"""In submitit's folder: the run folder of each of an array's jobs, in order."""


def ended(run: Path, code: int) -> int:
    """Write the attempt's end down and queue the job again where that makes sense; returns the job's exit code."""
    known = slurm.ask([job_id()]).get(job_id(), SlurmJob(""))
    if known.restarts > restarts():
        say("Slurm has started this job again meanwhile (this machine was cut off): nothing is left to do here")
        return code
    if code > 128:  # a task that a signal has ended: out of memory, or Slurm
        code = EXIT_LOST
    step = newest_step(run)
    again = code in AGAIN and known.state != "CANCELLED"  # whose ranks end as after any other signal
    row = [*_codes_at(step, run), code]
    futile = again and (len(row) >= INTERRUPTED or sum(c != EXIT_INTERRUPTED for c in row) >= FUTILE)
    why = "" if code == 0 else last_words(run)
    if futile:
        again = False
        say(
            f"{len(row)} attempts in a row ended at step {step} without a new checkpoint: not started again; "
            "save more often (checkpoint.every_minutes), ask for more time, or look at the log"
        )
    add_attempt(run, event="end", code=code, step=step, again=again, futile=futile, said=why)
    record = read_job(run)
    followed = record is not None and job_id() in record.ids[:-1]  # by the next job of a chain
    if again and not followed and (refused := slurm.requeue(job_id())):
        say(f"the job could not be queued again ({refused}); submit the run again, it goes on at step {step}")
    return code


def _codes_at(step: int, run: Path) -> list[int]:
    """Of the last attempts in a row that ended at this step and were followed by another."""
    ends = reversed([a for a in attempts(run) if a.get("event") == "end"])
    return [a["code"] for a in itertools.takewhile(lambda a: a.get("step") == step and a.get("again"), ends)]


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint by its name; -1 where there is none."""
    names = [path.name.partition("-")[2].partition(".")[0] for path in (run / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def last_words(run: Path) -> str:
    """Why the attempt failed: what the rank that speaks for all of them said last, with its traceback."""
    record = read_job(run)
    said: list[list[str]] = []
    for log in record.logs() if record else ():
        text = log.read_text(errors="replace").rpartition(MARK)[2].splitlines()[1:]
        lines = [PREFIX.sub("", line) for line in text if not line.startswith(("srun: ", "submitit ", "slurmstepd"))]
        spoken = [i for i, line in enumerate(lines) if line.startswith("ghostmask: ") and ": warning" not in line]
        ours = [i for i in spoken if not lines[i].endswith((SO_FAR, LOADING))]
        # A defect of the only rank is Python's own traceback.
        starts = ours or [i for i, line in enumerate(lines) if line.startswith(TRACEBACK)]
        if starts:
            said.append([line[:LINE] for line in lines[starts[-1] :]])
    if not said:
        return ""
    words = max(said, key=len)  # a traceback before the lines of those who lost a peer
    return "\n".join([*words[:1], *words[1:][-LAST_LINES:]])


def main(arguments: Sequence[str]) -> int:
    """See above; a job that is one of an array finds its run by its number."""
    folder, code = Path(arguments[0]), int(arguments[1])
    runs: list[Any] = json.loads((folder / RUNS).read_text())
    return ended(Path(runs[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]), code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
