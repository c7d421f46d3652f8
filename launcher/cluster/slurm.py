"""What Slurm itself says of jobs: its queue first, its accounting for those that have left it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 30
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
ACTIVE = (*WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
"""States of jobs that will go on, or are ending."""


@dataclass(frozen=True)
class SlurmJob:
    """state: Slurm's word, such as RUNNING; nodes: where it runs or ran; reason: why it waits; restarts: how often
    Slurm has started it again."""

    state: str
    nodes: str = ""
    reason: str = ""
    restarts: int = 0

    @property
    def waits(self) -> bool:
        """Whether it is going to be started."""
        return self.state in WAITING

    @property
    def active(self) -> bool:
        """Whether it is in the queue still: its end is not known."""
        return self.state in ACTIVE


def ask(ids: Sequence[str]) -> dict[str, SlurmJob]:
    """Of each job that Slurm knows still. A job whose node failed is final only when it is not in the queue again: the
    queue is asked first. Jobs are left out where Slurm cannot be asked."""
    arrays = {job.partition("_")[0] for job in ids}
    lines = [line for array in sorted(arrays) for line in _of_controller(array)]
    found = {job: _read(line) for job in ids for line in lines if _is_of(job, line)}
    missing = [job for job in ids if job not in found]
    if missing:
        found |= _of_accounting(missing)
    return found


def requeue(job: str) -> str:
    """Queue a job again; returns "", or what Slurm says against it."""
    done = _run(["scontrol", "requeue", job])
    return "" if done is not None and done.returncode == 0 else _reason(done)


def cancel(job: str) -> str:
    """End a job for good; returns "", or what Slurm says against it."""
    done = _run(["scancel", job])
    return "" if done is not None and done.returncode == 0 else _reason(done)


def _of_controller(job: str) -> list[str]:
    """A line on a job, or on each of an array's. The controller knows a job from its submission until some minutes
    after its end (MinJobAge)."""
    done = _run(["scontrol", "--oneliner", "show", "job", job])
    return done.stdout.splitlines() if done is not None and done.returncode == 0 else []


def _read(line: str) -> SlurmJob:
    values = dict(re.findall(r"(\w+)=(\S*)", line))
    nodes = "" if values.get("NodeList") in (None, "(null)") else values["NodeList"]
    restarts = values.get("Restarts", "0")
    return SlurmJob(values["JobState"], nodes, values.get("Reason", ""), int(restarts) if restarts.isdecimal() else 0)


def _is_of(job: str, line: str) -> bool:
    array, _, task = job.partition("_")
    if not task:
        return f"JobId={array} " in line
    found = re.search(r"ArrayJobId=(\d+) ArrayTaskId=(\S+)", line)
    return found is not None and found[1] == array and _holds(found[2], int(task))


def _holds(tasks: str, task: int) -> bool:
    """Whether an array's task stands in a list such as "0-3,7%2"."""
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and int(first) <= task <= int(last or first):
            return True
    return False


def _of_accounting(ids: Sequence[str]) -> dict[str, SlurmJob]:
    """The last thing that happened to each job, all its starts being asked for."""
    wanted = ["sacct", "-D", "-X", "-n", "-P", "-j", ",".join(ids), "-o", "JobID,State,NodeList"]
    done = _run(wanted)
    found: dict[str, SlurmJob] = {}
    for line in done.stdout.splitlines() if done is not None and done.returncode == 0 else ():
        job, state, nodes = [*line.split("|"), "", ""][:3]
        if job in ids and state:
            before = found[job].restarts + 1 if job in found else 0
            found[job] = SlurmJob(state.split()[0], nodes, "", before)
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _reason(done: subprocess.CompletedProcess[str] | None) -> str:
    return "Slurm does not answer" if done is None else " ".join(done.stderr.split()) or f"code {done.returncode}"
