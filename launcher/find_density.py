"""ghostmask find-density: with which value of the setting that decides it does a method end at the density asked for?

Bisection over whole runs, in the setting's logarithm, from a bracket that is widened until the target lies in it. Each
run is an ordinary one in the folder: a finished one is read and not repeated, so that the same command goes on where it
was stopped, in the middle of a run too.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ghostmask.engine.errors import InputError, bad_value, output, tell
from ghostmask.launcher.cells import planned, trained
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import flat, load_config
from ghostmask.launcher.table import markdown

WIDEN = 4.0
"""Factor of the first step that widens a bracket; the next ones are its square, its cube, ..."""
NOT_FOUND = 1
"""Exit code where no run came near enough."""


def find_density(
    name: str, settings: Sequence[str], *, target: float, tolerance: float, runs: int, over: str, ranks: int,
    folder: Path,
) -> int:  # fmt: skip
    """Train at most `runs` runs of configuration `name` until one ends within tolerance x target of the density
    `target`; print what each reached; returns 0, or NOT_FOUND.

    settings: key=value of all runs; over: the setting that is searched, "" = the one that decides the method's density,
    from the value it has. Raises InputError where there is none, and RunStopped where a run fails.
    """
    config = load_config(name, settings)
    key, first = searched(config, target, over)
    several = ["--ranks", str(ranks)] if ranks > 1 else []
    fixed = [text for text in settings if text.partition("=")[0] != key]
    densities: dict[float, float] = {}
    rows: list[list[str]] = []
    while len(densities) < runs and (value := proposed(densities, target, first)) not in densities:
        run = os.path.join(folder, f"{Path(name).stem}-{key.rpartition('.')[2]}={value:g}-seed{config.seed}")
        plan = planned(name, [*fixed, f"{key}={value:g}", f"run={run}"])
        check_config(plan.config, ranks)
        accuracy = trained(replace(plan, command=[*plan.command, *several]))
        summary = Path(plan.config.run) / "export" / "summary.json"
        densities[value] = float(json.loads(summary.read_text())["density"])
        rows.append([f"{value:g}", f"{densities[value]:.4g}", f"{accuracy:.2f}", run])
        tell(f"{key} = {value:g}: density {densities[value]:.4g}, accuracy {accuracy:.2f} %", sys.stderr)
        if abs(densities[value] / target - 1) <= tolerance:
            break
    output(markdown([key, "density", "test accuracy", "run"], rows))
    nearest = min(densities, key=lambda value: abs(math.log(max(densities[value], 1e-9) / target)))
    met = abs(densities[nearest] / target - 1) <= tolerance
    asked = f"the target {target:g} +- {tolerance:.0%}"
    verdict = f"is within {asked}" if met else f"is the nearest to {asked}, which was NOT met in {len(rows)} runs"
    output(f"{key}={nearest:g}: density {densities[nearest]:.4g} {verdict}")
    return 0 if met else NOT_FOUND


def searched(config: RunConfig, target: float, over: str) -> tuple[str, float]:
    """The setting that is searched and the value it starts from; see `find_density`."""
    key = over or config.mask.decided_by
    if not key:
        told = f"is told its density; give mask.density={target:g}"
        raise bad_value("mask.method", config.mask.method, told)
    first = flat(config).get(key)
    if isinstance(first, bool) or not isinstance(first, int | float) or not first > 0:
        raise InputError(f"{key} = {first}: the search starts from it; give a number above 0")
    return key, float(first)


def proposed(densities: Mapping[float, float], target: float, first: float) -> float:
    """The value to try next, of four digits; one that was tried where nothing is left between two of them.

    densities: by the values tried so far; more of the setting is expected to leave fewer weights.
    """
    if not densities:
        return _rounded(first)
    sparse = [value for value, density in densities.items() if density <= target]
    high = min(sparse, default=math.inf)
    low = max((v for v, density in densities.items() if density > target and v < high), default=0.0)
    step = WIDEN ** len(densities)
    if high == math.inf:
        return _rounded(low * step)
    return _rounded(math.sqrt(low * high) if low else high / step)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
