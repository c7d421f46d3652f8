"""How does a run stand: queued, running, finished, failed and why, and how far is it?"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostmask.engine.errors import InputError
from ghostmask.engine.lease import Owner, newest_owner
from ghostmask.launcher.cluster import slurm
from ghostmask.launcher.cluster.ended import TRACEBACK
from ghostmask.launcher.cluster.record import JobRecord, attempts, read_job
from ghostmask.launcher.cluster.slurm import SlurmJob
from ghostmask.launcher.finished import is_finished

TAIL_BYTES = 1 << 18
"""Of metrics.jsonl, which may be long: its last lines hold the newest numbers."""
LOCAL = "submitit.local._local"


@dataclass
class Standing:
    """state: queued, running, finished, failed, cancelled, stopped or new; where: machines; why: of what failed or
    waits; said: what the failed rank printed; job: of the cluster; requeues: times that it was started again; step of
    total_steps; epoch, phase: as they are counted in metrics.jsonl; accuracy, density in [0, 1]; seconds_left."""

    run: str
    state: str = "new"
    where: str = ""
    why: str = ""
    said: str = ""
    job: str = ""
    requeues: int = 0
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    phase: str = ""
    accuracy: float | None = None
    density: float | None = None
    seconds_left: float | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)


def standing(run: Path) -> Standing:
    """Of the run in `run`, which need not have a job. Asks Slurm, the run's lease and its files, and believes the queue
    first, then what the run itself wrote."""
    found = Standing(str(run))
    _read_metrics(run, found)
    found.attempts = attempts(run)
    found.requeues = max((a.get("restart", 0) for a in found.attempts), default=0)
    record = read_job(run)
    known = _jobs(record)
    active = {job: state for job, state in known.items() if state.active}
    owner = newest_owner(run)
    if is_finished(run):
        found.state, found.job = "finished", record.ids[-1] if record else ""
        _read_summary(run, found)
        found.seconds_left = None
    elif active:
        _from_queue(found, active)
    elif record is not None and record.cluster == "local" and active_jobs(record):
        found.state, found.where, found.job = "running", "this machine", record.ids[-1]
    elif owner is not None and not owner.released and owner.is_gone() is False:
        found.state, found.where = "running", f"{owner.host}, process {owner.pid}"
    else:
        _from_end(found, record, known, owner)
    if found.state != "running":
        found.seconds_left = None
    return found


def active_jobs(record: JobRecord) -> list[str]:
    """Those of its jobs that wait, run or are ending."""
    if record.cluster == "local":
        return [job for job in record.ids if _runs_here(job)]
    return [job for job, known in _jobs(record).items() if known.active]


def _jobs(record: JobRecord | None) -> dict[str, SlurmJob]:
    return slurm.ask(record.ids) if record is not None and record.cluster == "slurm" else {}


def _from_queue(found: Standing, active: dict[str, SlurmJob]) -> None:
    running = [job for job, state in active.items() if not state.waits]
    found.job = running[0] if running else next(iter(active))
    state = active[found.job]
    found.requeues = max(found.requeues, state.restarts)
    found.state = "queued" if state.waits else "running"
    found.where = "" if state.waits else state.nodes
    found.why = state.reason if state.waits and state.reason != "None" else ""
    if state.state == "COMPLETING":
        found.why = "ending"


def _from_end(found: Standing, record: JobRecord | None, known: dict[str, SlurmJob], owner: Owner | None) -> None:
    found.job = record.ids[-1] if record else ""
    last = next((state for job, state in reversed(known.items())), None)
    end = next((a for a in reversed(found.attempts) if a.get("event") == "end"), None)
    if last is not None and last.state.startswith("CANCELLED"):
        found.state = "cancelled"
    elif end is not None and end.get("code"):
        found.state, found.said = "failed", str(end.get("said", ""))
        found.why = _why(end)
    elif last is not None and last.state not in ("COMPLETED",):
        found.state, found.why = "failed", f"Slurm says {last.state}"
    elif record is not None or found.step is not None or owner is not None:
        found.state = "stopped"
        if owner is not None and not owner.released and owner.is_gone() is None:
            found.state, found.where = "unknown", f"{owner.host}, process {owner.pid}: on another machine, or stopped"


def _why(end: dict[str, Any]) -> str:
    lines = str(end.get("said", "")).strip().splitlines() or [""]
    first = lines[-1 if lines[0].startswith(TRACEBACK) else 0].removeprefix("ghostmask: ")
    given_up = "no new checkpoint in several attempts in a row; " if end.get("futile") else ""
    return f"{given_up}code {end['code']}" + (f": {first}" if first else "")


def _read_summary(run: Path, found: Standing) -> None:
    try:
        summary = json.loads((run / "export" / "summary.json").read_text())
        found.accuracy, found.density = summary["accuracy"], summary["density"]
    except (OSError, ValueError, KeyError, TypeError):
        found.why = "its export/summary.json cannot be read"


def _read_metrics(run: Path, found: Standing) -> None:
    for line in _last_lines(run / "metrics.jsonl"):
        found.step = line.get("step", found.step)
        found.epoch, found.phase = line.get("epoch", found.epoch), line.get("phase", found.phase)
        found.accuracy = line.get("eval/accuracy", found.accuracy)
        found.density = line.get("mask/density", found.density)
        total, rate = line.get("total_steps"), line.get("speed/images_per_s")
        if total and rate and line.get("samples") and line.get("step"):
            found.total_steps = total
            found.seconds_left = (total - line["step"]) * (line["samples"] / line["step"]) / rate


def _last_lines(file: Path) -> list[dict[str, Any]]:
    try:
        with open(file, "rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - TAIL_BYTES))
            texts = lines.read(TAIL_BYTES).splitlines()
    except OSError:
        return []
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:  # the one that was cut in two, or is being written
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _runs_here(pid: str) -> bool:
    """Whether submitit's controller of a local job is still there."""
    try:
        return LOCAL in Path(f"/proc/{int(pid)}/cmdline").read_text()
    except (OSError, ValueError):
        return False


def require_job(run: Path) -> JobRecord:
    """What was submitted for the run. Raises InputError where nothing was."""
    record = read_job(run)
    if record is None:
        raise InputError(f"run = {str(run)!r}: no job was submitted for it; see ghostmask submit --help")
    return record
