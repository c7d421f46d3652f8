"""What accuracy do several settings reach over several seeds? A loop over runs, and a table of mean and spread.

    python -m benchmarks.sweep digits_probmask digits_magnitude --vary mask.density=0.1,0.05 --seeds 3 train.epochs=20

A run that is finished is not run again, so an interrupted sweep goes on where it was; one with other settings in its
folder is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ghostmask.engine.errors import EXIT_INPUT, InputError
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import load_config, to_dict


def main(argv: list[str] | None = None) -> int:
    """Run every combination for every seed, one after the other on one rank; print a markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG or key=value", help="configurations, then settings of all"
    )
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B,...", help="values of one setting")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... per combination")
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="where the runs go")
    args = parser.parse_intermixed_args(argv)
    configs = [c for c in args.configs if "=" not in c]
    settings = [c for c in args.configs if "=" in c]
    varied = [
        [f"{key}={value}" for value in values.split(",")] for key, _, values in (v.partition("=") for v in args.vary)
    ]
    rows = []
    for config, *chosen in itertools.product(configs, *varied):
        name = "-".join([config, *(c.split("=")[1] for c in chosen)])
        scores = []
        for seed in range(args.seeds):
            own = [*settings, *chosen, f"seed={seed}", f"run={os.path.join(args.folder, f'{name}-seed{seed}')}"]
            scores.append(trained(load_config(config, own), ["train", config, *own]))
        rows.append([config, *(c.split("=")[1] for c in chosen), spread(scores)])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["config", *(v.partition("=")[0] for v in args.vary), f"test accuracy, {args.seeds} seeds"], rows))
    return 0


def trained(config: RunConfig, command: list[str]) -> float:
    """Test accuracy in percent of a run, made by `command` unless it is there; ends this process where that fails."""
    if accuracy(config) is None:
        # A process per run: DeepSpeed keeps the process group of the first run of a process.
        done = subprocess.run([sys.executable, "-m", "ghostmask", *command], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
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


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except InputError as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_INPUT) from None
