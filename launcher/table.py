"""ghostmask table: what did several runs reach? Mean and spread over seeds, a line per setting."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError, output
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.settings import flat
from ghostmask.launcher.values import as_text

NOT_SHOWN = ("run", "seed", "data.root", "train.device", "train.threads", "data.num_workers")
"""Settings that make no other experiment."""


@dataclass
class Line:
    """Runs that differ by their seed only: their accuracies in percent (top-5: of those that have one), their densities
    in [0, 1], and how those stand that have none."""

    accuracies: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def table(runs: Sequence[Path], file: Path | None) -> int:
    """Print a Markdown table of the runs, and write it as CSV to `file`, unless that is None; returns 0.

    A line per setting that differs between them: mean and sample standard deviation of the test accuracy (and of top-5
    accuracy, where some run has one), number of seeds, density; runs that are not finished are counted with what became
    of them. Raises InputError for a folder that is no run's.
    """
    settings = [flat(_config(run)) for run in runs]
    keys = sorted({key for values in settings for key in values if key not in NOT_SHOWN and _differs(key, settings)})
    shown = [tuple(as_text(values[key]) if key in values else "-" for key in keys) for values in settings]
    show_lines(keys, list(zip(shown, runs, strict=True)), file)
    return 0


def show_lines(columns: Sequence[str], runs: Sequence[tuple[tuple[str, ...], Path]], file: Path | None) -> None:
    """Print a Markdown table (and write a CSV) with a line for all runs that have the same values in `columns`."""
    from ghostmask.launcher.cluster.standing import standing

    lines: dict[tuple[str, ...], Line] = {}
    for shown, run in runs:
        line = lines.setdefault(shown, Line())
        found = _result(run)
        if found is None:
            line.others.append(standing(run).state)
        else:
            accuracy, top5, density = found
            line.accuracies.append(100 * accuracy)
            line.top5 += [] if top5 is None else [100 * top5]
            line.densities.append(density)
    if file is not None:
        _write_csv(file, columns, lines)
    ranked = any(line.top5 for line in lines.values())
    head = [*columns, "test accuracy", *(["top-5"] if ranked else []), "seeds", "density", "not finished"]
    rows = [
        [*shown, spread(line.accuracies), *([spread(line.top5)] if ranked else []), str(len(line.accuracies)),
         _density(line), _counted(line.others)]
        for shown, line in lines.items()
    ]  # fmt: skip
    output(markdown(head, rows))


def spread(scores: Sequence[float]) -> str:
    """Mean and, of several, sample standard deviation, such as "98.61 +- 0.28"; "-" of none."""
    if not scores:
        return "-"
    mean = f"{statistics.mean(scores):.2f}"
    return f"{mean} +- {statistics.stdev(scores):.2f}" if len(scores) > 1 else mean


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _config(run: Path) -> RunConfig:
    """Of a run that has started, else of its job."""
    submitted = run / "job" / "config.yaml"
    if not (run / "config.yaml").exists() and submitted.exists():
        from ghostmask.launcher.settings import load_config

        return load_config(str(submitted))
    return read_run(run)


def _differs(key: str, settings: Sequence[dict[str, object]]) -> bool:
    return len({as_text(values[key]) if key in values else None for values in settings}) > 1


def _result(run: Path) -> tuple[float, float | None, float] | None:
    """(accuracy, top-5 accuracy if there is one, density) in [0, 1] of a finished run; None for another."""
    try:
        summary = json.loads(read_small(run / "export" / "summary.json"))
        top5 = summary.get("top5")
        return float(summary["accuracy"]), None if top5 is None else float(top5), float(summary["density"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"run = {str(run)!r}: its export/summary.json cannot be read ({error}); export it again"
        ) from None


def _density(line: Line) -> str:
    return f"{statistics.mean(line.densities):.4g}" if line.densities else "-"


def _counted(states: Sequence[str]) -> str:
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _write_csv(file: Path, keys: Sequence[str], lines: dict[tuple[str, ...], Line]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*keys, "accuracy_mean", "accuracy_std", "top5_mean", "seeds", "density", "not_finished"])
    for shown, line in lines.items():
        mean = statistics.mean(line.accuracies) if line.accuracies else ""
        std = statistics.stdev(line.accuracies) if len(line.accuracies) > 1 else ""
        density = statistics.mean(line.densities) if line.densities else ""
        top5 = statistics.mean(line.top5) if line.top5 else ""
        writer.writerow([*shown, mean, std, top5, len(line.accuracies), density, _counted(line.others)])
    file.write_text(text.getvalue(), encoding="utf-8")
