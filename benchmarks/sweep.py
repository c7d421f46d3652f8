"""What accuracy do several settings reach over several seeds? A loop over runs, and a table of mean and spread.

    python -m benchmarks.sweep digits_probmask digits_magnitude --vary mask.density=0.1,0.05 --seeds 3 train.epochs=20

A run that is finished is not run again, so an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path


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
        scores = [
            accuracy(config, [*settings, *chosen, f"seed={seed}"], args.folder / f"{name}-seed{seed}")
            for seed in range(args.seeds)
        ]
        rows.append([config, *(c.split("=")[1] for c in chosen), spread(scores)])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["config", *(v.partition("=")[0] for v in args.vary), f"test accuracy, {args.seeds} seeds"], rows))
    return 0


def accuracy(config: str, settings: list[str], folder: Path) -> float:
    """Test accuracy in percent of one run, trained to its end unless it already is."""
    summary = folder / "export" / "summary.json"
    if not summary.exists():
        # A process per run: DeepSpeed keeps the process group of the first run of a process.
        command = [sys.executable, "-m", "launcher", "train", config, *settings, f"run={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 100 * float(json.loads(summary.read_text())["accuracy"])


def spread(scores: list[float]) -> str:
    """Mean and sample standard deviation, such as "98.61 +- 0.28"."""
    return f"{statistics.mean(scores):.2f} +- {statistics.stdev(scores) if len(scores) > 1 else 0.0:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
