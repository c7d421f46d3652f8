"""ghostmask sweep: what accuracy do several settings reach over several seeds? Runs, and a table of mean and spread.

A run that is finished is not run again, so an interrupted sweep goes on where it was (see launcher.cells); one with
other settings in its folder is an error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from ghostmask.engine.errors import InputError
from ghostmask.launcher.cells import PlannedRun, beside_others, planned, stop_if_failed, train_missing
from ghostmask.launcher.grid import combinations
from ghostmask.launcher.table import Cell, show_lines


def sweep(
    arguments: Sequence[str], *, vary: Sequence[str], seeds: int, folder: Path, jobs: int = 1, file: Path | None = None
) -> int:
    """Run every combination for every seed, `jobs` at a time on one rank each; print a markdown table; returns 0.

    arguments: configurations, and key=value settings of all runs; vary: "key=a,b,...", each crossed with the others;
    seeds: 0, 1, ... of each combination; folder: where the runs go; file: gets the table as CSV. Raises InputError
    before the first run for what is wrong with any of them, and RunStopped at the end where runs failed.
    """
    configs = [text for text in arguments if "=" not in text]
    if not configs:
        raise InputError("ghostmask sweep: name at least one CONFIG, such as digits_probmask")
    settings = beside_others([text for text in arguments if "=" in text], jobs)
    plans: list[tuple[tuple[str, ...], PlannedRun]] = []
    cells = itertools.product(configs, map(tuple, combinations("--vary", vary)))
    for config, chosen in dict.fromkeys(cells):  # one that is given twice is one: its seeds are no more
        values = [text.partition("=")[2] for text in chosen]
        name = "-".join([Path(config).stem, *values])
        for seed in range(seeds):
            own = [*settings, *chosen, f"seed={seed}", f"run={os.path.join(folder, f'{name}-seed{seed}')}"]
            plans.append(((config, *values), planned(config, own)))
    failed = train_missing([run for _, run in plans], jobs)
    columns = ["config", *(text.partition("=")[0] for text in vary)]
    show_lines(columns, [Cell(shown, run.folder) for shown, run in plans], file=file, failed=failed)
    stop_if_failed(failed)
    return 0
