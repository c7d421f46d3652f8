"""ghostmask sweep: what accuracy do several settings reach over several seeds? Runs, and a table of mean and spread.

A run that is finished is not run again, so an interrupted sweep goes on where it was; one with other settings in its
folder is an error.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ghostmask.engine.errors import InputError, RunStopped, bad_value
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import load_config, to_dict


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
    varied = [_values(text) for text in vary]
    plans: dict[tuple[str, ...], list[tuple[RunConfig, list[str]]]] = {}
    for config, *chosen in itertools.product(configs, *varied):
        name = "-".join([Path(config).stem, *(text.partition("=")[2] for text in chosen)])
        plans[config, *chosen] = runs = []
        for seed in range(seeds):
            own = [*settings, *chosen, f"seed={seed}", f"run={os.path.join(folder, f'{name}-seed{seed}')}"]
            runs.append((load_config(config, own), ["train", config, *own]))
            check_config(runs[-1][0], world_size=1)
    rows = []
    for (config, *chosen), runs in plans.items():
        scores = [trained(*run) for run in runs]
        rows.append([config, *(text.partition("=")[2] for text in chosen), spread(scores)])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["config", *(text.partition("=")[0] for text in vary), f"test accuracy, {seeds} seeds"], rows))
    return 0


def trained(config: RunConfig, command: list[str]) -> float:
    """Test accuracy in percent of a run, made by `command` unless it is there. Raises RunStopped where that fails."""
    if accuracy(config) is None:
        # A process per run: DeepSpeed keeps the process group of the first run of a process.
        done = subprocess.run([sys.executable, "-m", "ghostmask", *command], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            code = done.returncode if done.returncode > 0 else 128 - done.returncode
            raise RunStopped(f"sweep: {config.run} ended with exit code {code}; the same command goes on from it", code)
    score = accuracy(config)
    assert score is not None
    return score


def accuracy(config: RunConfig) -> float | None:
    """Test accuracy in percent of a finished run, None for one that is not. Raises InputError for another's folder."""
    summary = Path(config.run) / "export" / "summary.json"
    if not summary.exists():
        return None
    found = json.loads(summary.read_text())
    if found["config"] != json.loads(json.dumps(to_dict(config))):
        raise InputError(f"run = {config.run!r}: the folder holds a run with other settings; give another --folder")
    return 100 * float(found["accuracy"])


def spread(scores: Sequence[float]) -> str:
    """Mean and, of several, sample standard deviation, such as "98.61 +- 0.28"; "-" of none."""
    if not scores:
        return "-"
    mean = f"{statistics.mean(scores):.2f}"
    return f"{mean} +- {statistics.stdev(scores):.2f}" if len(scores) > 1 else mean


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _values(text: str) -> list[str]:
    """["key=a", "key=b"] of "key=a,b"."""
    key, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise bad_value("--vary", text, "give a setting and its values, such as mask.density=0.1,0.05")
    return [f"{key}={value}" for value in values.split(",")]
