"""ghostmask sweep: what accuracy do several settings reach over several seeds? Runs, and a table of mean and spread.

A run that is finished is not run again, so an interrupted sweep goes on where it was; one with other settings in its
folder is an error.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from ghostmask.engine.errors import InputError, RunStopped, tell
from ghostmask.engine.spawn import PRELOAD, fork_server
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.environment import prepare_environment
from ghostmask.launcher.grid import combinations
from ghostmask.launcher.settings import differences, from_dict, load_config
from ghostmask.launcher.table import show_lines


def sweep(arguments: Sequence[str], *, vary: Sequence[str], seeds: int, folder: Path) -> int:
    """Run every combination for every seed, one after the other on one rank; print a markdown table; returns 0.

    arguments: configurations, and key=value settings of all runs; vary: "key=a,b,...", each crossed with the others;
    seeds: 0, 1, ... of each combination; folder: where the runs go. Raises InputError before the first run for what is
    wrong with any of them, and RunStopped where a run fails.
    """
    configs = [text for text in arguments if "=" not in text]
    if not configs:
        raise InputError("ghostmask sweep: name at least one CONFIG, such as digits_probmask")
    settings = [text for text in arguments if "=" in text]
    plans: list[tuple[tuple[str, ...], PlannedRun]] = []
    cells = itertools.product(configs, map(tuple, combinations("--vary", vary)))
    for config, chosen in dict.fromkeys(cells):  # one that is given twice is one: its seeds are no more
        values = [text.partition("=")[2] for text in chosen]
        name = "-".join([Path(config).stem, *values])
        for seed in range(seeds):
            own = [*settings, *chosen, f"seed={seed}", f"run={os.path.join(folder, f'{name}-seed{seed}')}"]
            plans.append(((config, *values), planned(config, own)))
    for shown, run in plans:
        tell(f"{' | '.join(shown)} | {run.config.run}: {trained(run):.2f}", sys.stderr)
    columns = ["config", *(text.partition("=")[0] for text in vary)]
    show_lines(columns, [(shown, Path(run.config.run)) for shown, run in plans], file=None)
    return 0


@dataclass(frozen=True)
class PlannedRun:
    """A run of a table: its configuration, and the arguments of `ghostmask` that train it."""

    config: RunConfig
    command: list[str]


def planned(name: str, settings: Sequence[str]) -> PlannedRun:
    """The run of configuration `name` with key=value settings. Raises InputError where it could not be trained."""
    config = load_config(name, settings)
    check_config(config, world_size=1)
    return PlannedRun(config, ["train", name, *settings])


def trained(run: PlannedRun) -> float:
    """Test accuracy in percent of a run, which is trained unless it is there. Raises RunStopped where that fails."""
    if accuracy(run.config) is None:
        prepare_environment(run.config.train.device)
        code = _exit_code(run.command)
        if code:
            raise RunStopped(f"{run.config.run} ended with exit code {code}; the same command goes on from there", code)
    score = accuracy(run.config)
    assert score is not None
    return score


def accuracy(config: RunConfig) -> float | None:
    """Test accuracy in percent of a finished run, None for one that is not. Raises InputError for another's folder."""
    summary = Path(config.run) / "export" / "summary.json"
    if not summary.exists():
        return None
    found = json.loads(summary.read_text())
    try:
        before = from_dict(found["config"])
    except InputError as error:
        raise InputError(
            f"run = {config.run!r}: the folder holds a run of another version ({error}); give another --folder"
        ) from None
    if not config.train.replicas:  # not asked for: chosen when the run started
        config = replace(config, train=replace(config.train, replicas=before.train.replicas))
    changes = differences(before, config)
    if changes:
        others = f"the folder holds a run with other settings ({'; '.join(changes)})"
        raise InputError(f"run = {config.run!r}: {others}; give another --folder")
    return 100 * float(found["accuracy"])


def _exit_code(command: list[str]) -> int:
    """Of a `ghostmask` command in a process of its own: DeepSpeed keeps the process group of a process's first run.

    It is forked from a server that has imported torch and DeepSpeed once.
    """
    process = fork_server(*PRELOAD).Process(target=_run, args=(command,))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    assert process.exitcode is not None
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def _run(command: list[str]) -> None:
    from ghostmask.launcher.main import main

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        sys.exit(main(command))
