"""ghostmask tost-table: what does ToST bring? Masks at several densities, without and with it, over several seeds.

Every mask is trained from the initialisation of its seed, with tost=none and with each tweak: all (the configuration's
own tost section) or one of it. random, snip, grasp and synflow find it there; magnitude's and lth's is the result of a
run of its own without ToST. One rank each. A run that is finished is not run again: an interrupted table goes on where
it was (see launcher.cells).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ghostmask.engine.errors import output, unknown_name
from ghostmask.launcher.cells import PlannedRun, accuracy, beside_others, planned, stop_if_failed, train_missing
from ghostmask.launcher.checks import READ_BY_TWEAK
from ghostmask.launcher.settings import load_config
from ghostmask.launcher.table import markdown, spread
from ghostmask.launcher.values import as_text

TRAINED = {"magnitude": ["finetune.epochs=0"], "lth": ["mask.round_fraction=0.5"]}
"""Masks that need training to be found, with the settings of that run."""

TWEAKS = ("all", "ghost_skip", "ghost_swish", "label_smoothing", "lrsi")
WITHOUT = "none"

Cell = tuple[int, str, str, str]
"""(seed, density, mask, tweak or WITHOUT)."""


def tost_table(
    name: str, settings: Sequence[str], *, masks: Sequence[str], densities: Sequence[str], tweaks: Sequence[str],
    seeds: int, folder: Path, jobs: int = 1, only_print: bool = False,
) -> int:  # fmt: skip
    """Run what is missing, seed by seed, `jobs` at a time, unless only_print; print the table; returns 0.

    name: a configuration with ToST on; settings: key=value of every run; tweaks: of TWEAKS; folder: where the runs go.
    """
    for tweak in tweaks:
        if tweak not in TWEAKS:
            raise unknown_name("--tweaks", tweak, TWEAKS)
    settings = beside_others(settings, jobs)
    cells = list(itertools.product(range(seeds), densities, masks, (WITHOUT, *tweaks)))
    runs = {cell: _run(name, settings, folder, cell) for cell in cells}
    failed = {} if only_print else train_missing(list(runs.values()), jobs)
    output(table({cell: accuracy(run.config) for cell, run in runs.items()}, masks, densities, tweaks, seeds))
    stop_if_failed(failed)
    return 0


def table(
    scores: Mapping[Cell, float | None], masks: Sequence[str], densities: Sequence[str], tweaks: Sequence[str],
    seeds: int,
) -> str:  # fmt: skip
    """Markdown: a row per mask and density, of the seeds for which all its runs are there.

    Mean +- sample standard deviation, and that of the differences seed by seed to the run without ToST.
    """
    columns = ["mask", "density", "without ToST", *(f"{tweak}, difference" for tweak in tweaks), "seeds"]
    rows_: list[list[str]] = []
    for mask, density in itertools.product(masks, densities):
        rows = [[scores[seed, density, mask, tweak] for tweak in (WITHOUT, *tweaks)] for seed in range(seeds)]
        whole = [[score for score in row if score is not None] for row in rows if None not in row]
        cells = [spread([row[0] for row in whole])]
        for column in range(1, len(tweaks) + 1):
            differences = spread([row[column] - row[0] for row in whole])
            cells.append(f"{spread([row[column] for row in whole])}, {differences}")
        rows_.append([mask, density, *cells, str(len(whole))])
    return markdown(columns, rows_)


def _run(name: str, settings: Sequence[str], folder: Path, cell: Cell) -> PlannedRun:
    seed, density, mask, tweak = cell
    source = _source(name, settings, folder, seed, density, mask) if mask in TRAINED else None
    if source:
        given = ["mask.method=file", "mask.density=1", f"mask.path={source.config.run}"]
    else:
        given = [f"mask.method={mask}", f"mask.density={density}"]
    own = [*given, f"seed={seed}", f"run={os.path.join(folder, f'{mask}-{density}-{tweak}-seed{seed}')}"]
    if tweak == "all":
        return planned(name, [*settings, *own], source)
    if tweak == WITHOUT:
        return planned(name, [*_without_tost(settings), *own], source)
    section = load_config(name, settings).tost
    alone = [f"tost.{k}={as_text(getattr(section, k))}" for k in (tweak, *READ_BY_TWEAK.get(tweak, ()))]
    return planned(name, [*_without_tost(settings), *own, *alone], source)


def _source(name: str, settings: Sequence[str], folder: Path, seed: int, density: str, mask: str) -> PlannedRun:
    """The run, without ToST, whose result is the mask."""
    run = os.path.join(folder, f"{mask}-{density}-found-seed{seed}")
    own = [f"mask.method={mask}", f"mask.density={density}", f"seed={seed}", f"run={run}", *TRAINED[mask]]
    return planned(name, [*_without_tost(settings), *own])


def _without_tost(settings: Sequence[str]) -> list[str]:
    return [*(text for text in settings if not text.startswith("tost")), "tost=none"]
