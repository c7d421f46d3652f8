"""ghostmask runs: which runs are there, how do they stand, and what did they reach?"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from ghostmask.engine.errors import InputError, output
from ghostmask.launcher import locate
from ghostmask.launcher.cluster.standing import Standing, standing
from ghostmask.launcher.cluster.status import known_runs
from ghostmask.launcher.table import markdown

WRITTEN = ("metrics.jsonl", "export/summary.json", "run.json", "config.yaml", "job.json")
"""Files whose newest time is when a run last did something."""


def runs(named: Sequence[str], *, as_json: bool) -> int:
    """Print a line for each run, the newest first, of all in runs/ where none is named; returns 0. Folders that no run
    wrote are passed over."""
    folders = known_runs(named) if named else locate.runs_in(locate.RUNS)
    now = time.time()
    found = sorted(((written(folder), stands(folder)) for folder in folders), key=lambda one: -one[0])
    if as_json:
        output(json.dumps([{**asdict(run), "written": at} for at, run in found], indent=1))
    elif not found:
        output(f"there is no run in {locate.RUNS}/")
    else:
        rows = [[run.run, run.state, *progress(run), age(now - at)] for at, run in found]
        output(markdown(["run", "state", "step", "accuracy", "density", "last written"], rows))
    return 0


def stands(folder: Path) -> Standing:
    """How a run stands; "unknown" where a file of it is damaged."""
    try:
        return standing(folder)
    except InputError as error:
        return Standing(str(folder), state="unknown", why=str(error))


def written(folder: Path) -> float:
    """When a run last wrote something, in seconds since 1970; 0 where that cannot be seen."""
    times = [0.0]
    for name in WRITTEN:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def progress(run: Standing) -> list[str]:
    """Step of all, accuracy, density, as they are shown."""
    step = "" if run.step is None else f"{run.step:,}/{run.total_steps:,}" if run.total_steps else f"{run.step:,}"
    return [step, *("" if value is None else f"{value:.2%}" for value in (run.accuracy, run.density))]


def age(seconds: float) -> str:
    """5 s, 12 min, 3 h, 9 d."""
    passed = timedelta(seconds=max(0, round(seconds)))
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed.total_seconds() >= 2 * unit:
            return f"{passed.total_seconds() // unit:.0f} {name} ago"
    return f"{passed.total_seconds():.0f} s ago"
