"""How are the runs of a table trained? Those that are not there yet, several at a time; one that fails stops no other.

Every cell of a table is an ordinary run folder. What is finished is read, what was interrupted goes on, what failed is
tried again when the same command runs again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ghostmask.data_pipelines.open import check_prepared
from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import EXIT_DEFECT, EXIT_INTERRUPTED, InputError, RunStopped, tell
from ghostmask.engine.spawn import PRELOAD, fork_server
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.environment import prepare_environment
from ghostmask.launcher.finished import is_finished
from ghostmask.launcher.settings import differences, from_dict, load_config

ONE_THREAD = {"train.threads": "1", "data.num_workers": "1"}
"""Settings of a run beside others: more threads than cores wait for each other, spinning."""
ONE_THREAD_VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
PRELOAD_ONE_THREAD = (*PRELOAD, "ghostmask.launcher.train", "ghostmask.data_pipelines.loading.pipeline")
"""FFCV compiles for seconds when it is imported, and starts numba's threads, which a fork must not have: so in the
server of runs of one thread only, which have none."""
CTRL_C = 130


@dataclass(frozen=True)
class PlannedRun:
    """A run of a table: its configuration, the arguments of `ghostmask` that train it, and the run that it reads."""

    config: RunConfig
    command: list[str]
    needs: PlannedRun | None = None

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self.config.run)


def planned(name: str, settings: Sequence[str], needs: PlannedRun | None = None) -> PlannedRun:
    """The run of configuration `name` with key=value settings. Raises InputError where it could not be trained."""
    config = load_config(name, settings)
    check_config(config, world_size=1)
    return PlannedRun(config, ["train", name, *settings], needs)


def merged(*settings: Iterable[str]) -> list[str]:
    """key=value settings, of which a later one replaces an earlier one of the same key."""
    return list({item.partition("=")[0]: item for items in settings for item in items}.values())


def beside_others(settings: Sequence[str], jobs: int) -> list[str]:
    """`settings` of a run beside jobs - 1 others: with one thread, unless they say otherwise."""
    alone = [f"{key}={value}" for key, value in ONE_THREAD.items()] if jobs > 1 else []
    return merged(alone, settings)


def train_missing(runs: Sequence[PlannedRun], jobs: int = 1) -> dict[Path, int]:
    """Train what is not finished, `jobs` runs at a time, in their order, each after the run that it needs.

    Returns the exit codes of those that failed, by folder. Raises RunStopped where a signal ended a run, after it has
    ended the others, which have saved; InputError for a folder with a run of other settings.
    """
    order = {run.folder: run for one in runs for run in (one.needs, one) if run is not None}
    missing = {folder: run for folder, run in order.items() if accuracy(run.config) is None}
    if missing:
        said = f"{len(missing)} of {len(order)} runs are to be trained" + (f", {jobs} at a time" if jobs > 1 else "")
        tell(said, sys.stderr)
        for data in {run.config.data for run in missing.values()}:
            check_prepared(data)
        prepare_environment(next(iter(missing.values())).config.train.device)
    failed: dict[Path, int] = {}
    running: dict[int, tuple[PlannedRun, Any]] = {}
    try:
        while missing or running:
            while len(running) < jobs and (run := _next(missing, running, failed)) is not None:
                process = _start(run, quiet=jobs > 1)
                running[process.sentinel] = run, process
            for sentinel in wait(list(running)) if running else ():
                run, process = running.pop(sentinel)  # type: ignore[arg-type]
                _end(run, process, failed, len(missing) + len(running))
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    return failed


def stop_if_failed(failed: Mapping[Path, int]) -> None:
    """Raise RunStopped, with the exit code of the first, where runs failed: call it when the table is printed."""
    if failed:
        first, code = next(iter(failed.items()))
        more = f" ({len(failed)} runs failed)" if len(failed) > 1 else ""
        raise RunStopped(f"{first} ended with exit code {code}{more}; the same command tries again", code)


def trained(run: PlannedRun) -> float:
    """Test accuracy in percent of a run, which is trained unless it is there. Raises RunStopped where that fails."""
    stop_if_failed(train_missing([run]))
    score = accuracy(run.config)
    assert score is not None
    return score


def accuracy(config: RunConfig) -> float | None:
    """Test accuracy in percent of a finished run, None for one that is not. Raises InputError for another's folder."""
    summary = Path(config.run) / "export" / "summary.json"
    if not is_finished(Path(config.run)):
        return None
    try:
        found = json.loads(read_small(summary))
        score, before = 100 * float(found["accuracy"]), from_dict(found["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # an InputError is a ValueError
        raise InputError(
            f"run = {config.run!r}: the folder holds a run of another version, or its export/summary.json cannot be "
            f"read ({error}); give another --folder"
        ) from None
    if not config.train.replicas:  # not asked for: chosen when the run started
        config = replace(config, train=replace(config.train, replicas=before.train.replicas))
    changes = differences(before, config)
    if changes:
        others = f"the folder holds a run with other settings ({'; '.join(changes)})"
        raise InputError(f"run = {config.run!r}: {others}; give another --folder")
    return score


def _next(
    missing: dict[Path, PlannedRun], running: Mapping[int, tuple[PlannedRun, Any]], failed: dict[Path, int]
) -> PlannedRun | None:
    """The first run that can start, taken out of `missing`; those whose source failed have failed too."""
    busy = {run.folder for run, _ in running.values()}
    for folder, run in list(missing.items()):
        source = run.needs.folder if run.needs else None
        if source is not None and source in failed:
            tell(f"{folder} FAILED: it needs {source}", sys.stderr)
            del missing[folder]
            failed[folder] = failed[source]
        elif source not in missing and source not in busy:
            return missing.pop(folder)
    return None


def _start(run: PlannedRun, *, quiet: bool) -> Any:
    """A process of its own: DeepSpeed keeps the process group of a process's first run. It is forked from a server that
    has imported torch and DeepSpeed once. quiet: what it says goes to a file beside its folder."""
    alone = run.config.train.threads == run.config.data.num_workers == 1
    server = fork_server(*(PRELOAD_ONE_THREAD if alone else PRELOAD))
    process = server.Process(target=_run, args=(run.command, str(_log(run)) if quiet else ""))
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(ONE_THREAD_VARIABLES, "1") if alone else {})
    try:
        process.start()  # the first one starts the server
    finally:
        for name in ONE_THREAD_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(before)
    return process


def _run(command: list[str], log: str) -> None:
    from ghostmask.launcher.main import main

    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        sys.exit(main(command))


def _end(run: PlannedRun, process: Any, failed: dict[Path, int], left: int) -> None:
    process.join()
    code = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode
    if code in (EXIT_INTERRUPTED, CTRL_C):
        raise RunStopped(f"{run.folder} was interrupted; the same command goes on from there", code)
    score = None if code else accuracy(run.config)
    if score is not None:
        tell(f"{run.folder}: {score:.2f} ({left} left)", sys.stderr)
        return
    said = _last_line(_log(run))
    tell(f"{run.folder} FAILED with exit code {code}{f', {said}' if said else ''} ({left} left)", sys.stderr)
    failed[run.folder] = code or EXIT_DEFECT


def _log(run: PlannedRun) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
