"""The files that tell of a run's jobs: RUN/job.json, written when one is submitted, and attempts.jsonl beside the logs,
to which each start and end of a job adds a line."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ghostmask.engine.atomic import read_small, replacing
from ghostmask.engine.errors import InputError

FILE = "job.json"
ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True)
class JobRecord:
    """cluster: slurm or local; ids: of its jobs, several where they are chained, each "A_i" of an array's; folder:
    where submitit keeps them and the logs lie; submitted: when, in seconds since 1970; ranks: of a job; command: what
    was typed."""

    cluster: str
    ids: list[str]
    folder: str
    submitted: float
    ranks: int
    command: list[str] = field(default_factory=list)

    def log(self, job: str, rank: int) -> Path:
        """What a rank printed, in all attempts of a job."""
        return Path(self.folder) / f"{job}_{rank}_log.out"

    def logs(self) -> list[Path]:
        """Those of all ranks, of the job that wrote last."""
        for job in reversed(self.ids):
            found = [self.log(job, rank) for rank in range(self.ranks) if self.log(job, rank).exists()]
            if found:
                return found
        return []


def read_job(run: Path) -> JobRecord | None:
    """What was submitted for a run last; None where nothing was. Raises InputError for a file that cannot be read."""
    try:
        return JobRecord(**json.loads(read_small(run / FILE)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"run = {str(run)!r}: its {FILE} cannot be read ({error}); remove it") from None


def write_job(run: Path, record: JobRecord) -> None:
    """Write the record of a run's new job."""
    with replacing(run / FILE) as writing:
        writing.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def attempts(run: Path) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl that are whole, oldest first."""
    try:
        lines = read_small(run / "job" / ATTEMPTS).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def add_attempt(run: Path, **values: Any) -> None:
    """Add a line, in one write, with the time and the job that this process belongs to."""
    line = json.dumps({"time": round(time.time(), 1), "job": job_id(), "restart": restarts(), **values}) + "\n"
    (run / "job").mkdir(parents=True, exist_ok=True)
    handle = os.open(run / "job" / ATTEMPTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def job_id() -> str:
    """Of the job that this process belongs to, as submitit writes it; "" outside of one."""
    env = os.environ
    if array := env.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    return env.get("SLURM_JOB_ID") or env.get("SUBMITIT_LOCAL_JOB_ID", "")


def restarts() -> int:
    """How often Slurm has started this job again."""
    text = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0
