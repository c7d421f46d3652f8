"""ghostmask status, cancel and logs: what became of what was submitted."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from ghostmask.engine.errors import InputError, output
from ghostmask.launcher import locate
from ghostmask.launcher.cluster import slurm
from ghostmask.launcher.cluster.record import FILE
from ghostmask.launcher.cluster.standing import Standing, active_jobs, require_job, standing
from ghostmask.launcher.table import markdown

FOLLOW_S, LOOK_S = 0.5, 10.0
"""Between two looks at a log, and between two questions to Slurm."""
OVER = ("finished", "failed", "cancelled", "stopped", "new")
"""States in which nothing more is written to a log."""


def status(runs: Sequence[str], *, as_json: bool) -> int:
    """Print how each run stands, of all in runs/ where none is named; returns 0."""
    found = [standing(folder) for folder in (known_runs(runs) if runs else locate.runs_in(locate.RUNS))]
    if as_json:
        output(json.dumps([asdict(run) for run in found], indent=1))
        return 0
    if not found:
        output(f"there is no run in {locate.RUNS}/")
        return 0
    head = ["run", "state", "job", "requeued", "epoch", "step", "accuracy", "density", "left"]
    output(markdown(head, [_row(run) for run in found]))
    for run in found:
        if run.why:
            output(f"\n{run.run}: {run.why}")
            if "\n" in run.said:
                output("\n".join(f"    {line}" for line in run.said.splitlines()[1:]))
    return 0


def cancel(runs: Sequence[str]) -> int:
    """End the jobs of runs for good; what was saved last stays. Returns 0."""
    for folder in known_runs(runs):
        record = require_job(folder)
        active = active_jobs(record)
        for job in active:
            if record.cluster == "local":
                os.kill(int(job), signal.SIGTERM)  # the controller hands it on to the task, which saves
            elif refused := slurm.cancel(job):
                raise InputError(f"run = {str(folder)!r}: Slurm does not cancel job {job}: {refused}")
        output(f"{folder}: job {', '.join(active)} cancelled" if active else f"{folder}: has no job to cancel")
    return 0


def logs(run: str, *, rank: int, follow: bool) -> int:
    """Print what a rank printed, in all attempts of the newest job; follow: until the run ends. Returns 0."""
    folder = known_runs([run])[0]
    record = require_job(folder)
    if not 0 <= rank < record.ranks:
        raise InputError(f"--rank {rank}: the job has ranks 0 to {record.ranks - 1}")
    paths = [record.log(job, rank) for job in record.ids]
    if not follow and not any(path.exists() for path in paths):
        raise InputError(f"run = {str(folder)!r}: rank {rank} has not printed anything yet; see ghostmask status")
    shown = dict.fromkeys(paths, 0)
    asked = 0.0
    while True:
        over = False
        if follow and time.monotonic() - asked > LOOK_S:
            over, asked = standing(folder).state in OVER, time.monotonic()
        for path in paths:
            shown[path] = _print_from(path, shown[path])
        if over or not follow:
            return 0
        time.sleep(FOLLOW_S)


def known_runs(runs: Sequence[str]) -> list[Path]:
    """Folders of runs, or of sweeps whose runs are meant, each once. Raises InputError for one that holds neither."""
    found: list[Path] = []
    for text in runs:
        folder = locate.run_folder(locate.typed_path("run", text))
        folder = folder if folder.is_dir() or not Path(text).is_dir() else Path(text)
        if (folder / FILE).exists() or (folder / "run.json").exists() or (folder / "config.yaml").exists():
            found.append(folder)
        elif inner := locate.runs_in(folder):
            found += inner
        else:
            found.append(locate.find_run(text))
    return list({os.path.realpath(folder): folder for folder in found}.values())


def _row(run: Standing) -> list[str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    state = f"{run.state} on {run.where}" if run.where else run.state
    step = "" if run.step is None else f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)
    epoch = "" if run.epoch is None else f"{run.epoch + 1} ({run.phase})"  # counted over all phases
    left = "" if run.seconds_left is None else str(timedelta(seconds=round(run.seconds_left)))
    again = str(run.requeues) if run.job else ""
    return [run.run, state, run.job, again, epoch, step, percent(run.accuracy), percent(run.density), left]


def _print_from(path: Path, start: int) -> int:
    """Copy a file to stdout from byte `start` on; returns where it ends."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read()
    except FileNotFoundError:
        return start
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(text)
